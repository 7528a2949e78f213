"""From what a user calls a model to the files of it: ``builtin:tiny``, a local directory or a Hub repository."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.builtin import TINY_ID, tiny_path
from llmtune.errors import ModelError
from llmtune.models.hub import fetch_config
from llmtune.presets import Preset
from llmtune.presets.preset import GENERIC

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmtune.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLocation:
    """A model whose ``config.json`` has been read and can be trained on.

    Attributes:
        id: What the user called it.
        source: What ``from_pretrained`` takes.
        revision: Commit on the Hub that every file is taken from; None for a directory.
        offline: Only the local cache can be asked.
    """

    id: str
    source: str
    revision: str | None
    token: str | None = field(repr=False)
    trust_remote_code: bool
    offline: bool
    config: PreTrainedConfig

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments common to every ``from_pretrained`` of this model."""
        return {
            "revision": self.revision or "main",
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.offline,
        }


def locate(wanted: ModelConfig) -> ModelLocation:
    """Find the model and read its configuration; no weights are fetched.

    Raises:
        ModelError: Not found, gated, Hub unreachable, foreign code, or not a causal language model.
    """
    token = wanted.token.get_secret_value() if wanted.token else None
    directory = _directory(wanted.id)
    if directory is None:
        hub = fetch_config(wanted.id, wanted.revision, token)
        source, revision, offline = wanted.id, hub.commit, hub.offline
    elif wanted.revision is not None:
        raise ModelError(f"model '{wanted.id}' is a directory, but model.revision={wanted.revision} is for Hub models")
    else:
        source, revision, offline = str(directory), None, False
    config = _read_config(wanted, source, revision=revision, token=token, offline=offline)
    _require_causal(wanted.id, config, remote_code=wanted.trust_remote_code)
    return ModelLocation(
        id=wanted.id,
        source=source,
        revision=revision,
        token=token,
        trust_remote_code=wanted.trust_remote_code,
        offline=offline,
        config=config,
    )


def _directory(model_id: str) -> Path | None:
    """The directory that ``model_id`` means; None when it is a Hub id."""
    if model_id == TINY_ID:
        return tiny_path()
    if model_id.startswith("builtin:"):
        raise ModelError(f"model '{model_id}': the only builtin model is '{TINY_ID}'")
    path = Path(model_id).expanduser()
    expected = "expected a directory written by save_pretrained"
    if path.is_file():
        raise ModelError(f"model '{model_id}' is a file; {expected}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model directory {model_id} has no config.json; {expected}")
        return path.resolve()
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelError(f"model '{model_id}': no such directory; {expected}, or a Hub id such as 'name/model'")
    return None


def _read_config(
    wanted: ModelConfig, source: str, *, revision: str | None, token: str | None, offline: bool
) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source,
            revision=revision or "main",
            token=token,
            trust_remote_code=wanted.trust_remote_code,
            local_files_only=offline,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ModelError(
                f"model '{wanted.id}' wants to run Python code from its own repository, which is off. "
                "If you trust its author: --set model.trust_remote_code=true"
            ) from None
        raise ModelError(f"model '{wanted.id}': its config.json cannot be used: {text[:300]}") from None


def _require_causal(model_id: str, config: PreTrainedConfig, *, remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = list(getattr(config, "architectures", None) or [])
    if remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if architectures:
        causal = not set(architectures).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    else:
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not causal or getattr(config, "is_encoder_decoder", False):
        found = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"model '{model_id}' is a {found}, not a causal language model; llmtune tunes models that "
            "AutoModelForCausalLM loads (…ForCausalLM)"
        )


def preset_of(location: ModelLocation) -> Preset:
    """The preset of the family this model belongs to; the generic one, with a notice, when unknown.

    A copy under a name of its own is told by its shape.
    """
    from llmtune.models.spec import read_spec

    facts = {
        "model_type": location.config.model_type,
        "architecture": (getattr(location.config, "architectures", None) or [None])[0],
        "name": TINY_ID if location.id == TINY_ID else location.source,
    }
    preset = Preset.recognise(**facts)
    named = facts["name"] is not None and preset.recognition.matches_name(facts["name"])
    if named or not Preset.is_shared(facts["model_type"], facts["architecture"]):
        return preset
    return Preset.recognise(**facts, shape=read_spec(location, GENERIC).shape)
