"""From what a user calls a model to the files of it: ``builtin:tiny``, a local directory or a Hub repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import ModelError
from llmtune.presets import Preset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmtune.config import ModelConfig

TINY_ID = "builtin:tiny"
# Seconds to wait for the Hub's first answer; its client would retry for half a minute before saying no.
HUB_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLocation:
    """A model whose ``config.json`` has been read and can be trained on.

    ``source`` is what ``from_pretrained`` takes; ``id`` is what the user called it.
    """

    id: str
    source: str
    revision: str | None
    token: str | None
    trust_remote_code: bool
    config: PreTrainedConfig

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments common to every ``from_pretrained`` of this model."""
        return {"revision": self.revision or "main", "token": self.token, "trust_remote_code": self.trust_remote_code}


def locate(wanted: ModelConfig) -> ModelLocation:
    """Find the model and read its configuration; no weights are fetched.

    Raises:
        ModelError: Not found, gated, Hub unreachable, foreign code, or not a causal language model.
    """
    from llmtune.builtin import tiny_path

    token = wanted.token.get_secret_value() if wanted.token else None
    if wanted.id == TINY_ID:
        source = str(tiny_path())
    elif wanted.id.startswith("builtin:"):
        raise ModelError(f"model '{wanted.id}': the only builtin model is '{TINY_ID}'")
    elif Path(wanted.id).is_dir():
        source = str(Path(wanted.id).resolve())
        if not (Path(source) / "config.json").is_file():
            raise ModelError(
                f"model directory {wanted.id} has no config.json; expected a directory written by save_pretrained"
            )
    elif wanted.id.startswith((".", "/", "~")) or wanted.id.count("/") > 1:
        raise ModelError(f"model '{wanted.id}': no such directory")
    else:
        source = wanted.id
        _fetch_config(wanted.id, wanted.revision, token)
    config = _read_config(wanted, source, token)
    _require_causal(wanted.id, config)
    return ModelLocation(
        id=wanted.id,
        source=source,
        revision=wanted.revision,
        token=token,
        trust_remote_code=wanted.trust_remote_code,
        config=config,
    )


def _fetch_config(model_id: str, revision: str | None, token: str | None) -> None:
    """Bring ``config.json`` of a Hub repository into the local cache, or say precisely why that cannot be done."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = constants.HF_HUB_OFFLINE or not _hub_answers(constants.ENDPOINT)
    try:
        hf_hub_download(model_id, "config.json", revision=revision, token=token, local_files_only=offline)
    except GatedRepoError:
        raise ModelError(
            f"model '{model_id}' is gated: accept its licence at {constants.ENDPOINT}/{model_id}, then set HF_TOKEN "
            "or pass --set model.token=…"
        ) from None
    except HFValidationError as error:
        raise ModelError(f"model '{model_id}': is neither a directory here nor a valid Hub id ({error})") from None
    except RevisionNotFoundError:
        raise ModelError(f"model '{model_id}': the Hub has no revision '{revision}' of it") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model '{model_id}': not found on the Hub and no directory of that name here. Check the spelling; "
            f"if it is private set HF_TOKEN. Known without a download: {', '.join(_near_ids(model_id))}"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(_unreachable(model_id, constants.ENDPOINT, constants.HF_HUB_OFFLINE)) from None
    except EntryNotFoundError:
        raise ModelError(
            f"model '{model_id}': the repository has no config.json, so it is no transformers model"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"model '{model_id}': the Hub answered {error}") from None


def _hub_answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=HUB_PROBE_SECONDS)
    except OSError:
        return False
    except Exception as error:  # the HTTP client's own tree of transport errors; any of them means: no answer
        if "httpx" in type(error).__module__:
            return False
        raise
    return True


def _unreachable(model_id: str, endpoint: str, offline: bool) -> str:
    cause = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} cannot be reached"
    return (
        f"model '{model_id}': {cause}, and the model is not in the local cache. Ways out: connect and try again; "
        f"copy the model here and pass --model PATH; or try llmtune itself with --model {TINY_ID}"
    )


def _near_ids(model_id: str) -> list[str]:
    import difflib

    from llmtune.presets import catalogue

    ids = [entry.id for entry in catalogue()]
    return difflib.get_close_matches(model_id, ids, n=3, cutoff=0.3) or [TINY_ID]


def _read_config(wanted: ModelConfig, source: str, token: str | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source, revision=wanted.revision or "main", token=token, trust_remote_code=wanted.trust_remote_code
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text or "custom code" in text:
            raise ModelError(
                f"model '{wanted.id}' wants to run Python code from its own repository, which is off. "
                "If you trust its author: --set model.trust_remote_code=true"
            ) from None
        raise ModelError(f"model '{wanted.id}': its configuration cannot be used: {text[:300]}") from None


def _require_causal(model_id: str, config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = list(getattr(config, "architectures", None) or [])
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures:
        causal = any(name in known for name in architectures) or remote
    else:
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or remote
    if not causal or getattr(config, "is_encoder_decoder", False):
        found = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"model '{model_id}' is a {found}, not a causal language model; llmtune tunes models that "
            "AutoModelForCausalLM loads (…ForCausalLM)"
        )


def preset_of(location: ModelLocation) -> Preset:
    """The preset of the family this model belongs to; the generic one, with a notice, when unknown."""
    architectures = getattr(location.config, "architectures", None) or [None]
    return Preset.recognise(model_type=location.config.model_type, architecture=architectures[0], name=location.id)
