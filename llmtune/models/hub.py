"""The Hub, asked once and politely: is this model there, may we have it, and which commit is it?"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from llmtune.builtin import TINY_ID
from llmtune.console import speaker
from llmtune.errors import ModelError

# Seconds to wait for the first answer. The Hub's own client would retry for half a minute before it says no.
ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A model of the Hub whose ``config.json`` lies in the local cache.

    Attributes:
        commit: The commit it is at; every file is taken from this one, so that nothing changes on the way.
        offline: The Hub does not answer, so that only what is cached can be loaded.
    """

    commit: str
    offline: bool


def fetch_config(model_id: str, revision: str | None, token: str | None) -> HubModel:
    """Bring ``config.json`` into the local cache. A cached copy serves where the Hub does not.

    Raises:
        ModelError: Says precisely why it cannot be had, and what would help.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"model '{model_id}': is neither a directory here nor a valid Hub id ({error})") from None
    refusal = None if constants.HF_HUB_OFFLINE else _refusal(model_id, revision, token)
    if refusal is None and not constants.HF_HUB_OFFLINE:
        path = hf_hub_download(model_id, "config.json", revision=revision, token=token)
        return HubModel(commit=Path(path).parent.name, offline=False)
    if isinstance(cached, str):
        if refusal is not None:
            speaker.warn(f"model '{model_id}': {refusal}. The copy in the local cache is used.")
        return HubModel(commit=Path(cached).parent.name, offline=True)
    if refusal is not None:
        raise ModelError(f"model '{model_id}': {refusal}")
    raise ModelError(f"model '{model_id}': HF_HUB_OFFLINE is set and it is not in the local cache. {_ways_out()}")


def _refusal(model_id: str, revision: str | None, token: str | None) -> str | None:
    """Why the Hub does not give ``config.json``, in one request; None when it does.

    Raises:
        ModelError: The Hub knows the model, but not this revision, or not as a model: a cached copy cannot help.
    """
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = constants.ENDPOINT
    try:
        url = hf_hub_url(model_id, "config.json", revision=revision)
        metadata = get_hf_file_metadata(url, token=token, timeout=ANSWER_SECONDS)
    except RevisionNotFoundError:
        raise ModelError(
            f"model '{model_id}': the Hub has no revision '{revision}' of it; see {endpoint}/{model_id}/tree/main"
        ) from None
    except EntryNotFoundError:
        raise ModelError(
            f"model '{model_id}': the repository has no config.json, so it is no transformers model"
        ) from None
    except GatedRepoError:
        accept = f"accept its licence at {endpoint}/{model_id}"
        if token or get_token():
            return f"is gated, and your access token does not open it: {accept} with the account of the token"
        return f"is gated: {accept}, then set HF_TOKEN to your access token"
    except RepositoryNotFoundError:
        return (
            "not found on the Hub, and there is no directory of that name here. Check the spelling; if it is private, "
            f"set HF_TOKEN. Similar models: {', '.join(_near_ids(model_id))}"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            return f"{endpoint} does not accept your access token; make a new one there, or unset HF_TOKEN"
        return f"{endpoint} answered with status {status}. {_ways_out()}"
    except (OSError, _transport_error()) as error:
        return f"{endpoint} cannot be reached ({' '.join(str(error).split()) or type(error).__name__}). {_ways_out()}"
    if metadata.commit_hash is None or metadata.etag is None:
        return f"what answers at {endpoint} is no Hub; check HF_ENDPOINT and the proxy. {_ways_out()}"
    return None


def _transport_error() -> type[Exception]:
    """The root of what the Hub's HTTP client raises when there is no answer; the client is httpx or its successor."""
    from huggingface_hub import get_session

    client = next(cls for cls in type(get_session()).__mro__ if cls.__name__ == "Client")
    error: type[Exception] = importlib.import_module(client.__module__.partition(".")[0]).TransportError
    return error


def _ways_out() -> str:
    return (
        "Ways out: connect and try again; copy the model here and pass --model PATH; or try llmtune itself with "
        f"--model {TINY_ID}"
    )


def _near_ids(model_id: str) -> list[str]:
    from llmtune.presets import catalogue

    ids = [entry.id for entry in catalogue()]
    return difflib.get_close_matches(model_id, ids, n=3, cutoff=0.3) or [TINY_ID]
