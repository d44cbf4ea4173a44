"""A name that is neither a folder nor in reach is refused within seconds, in one message that says both."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from fourfold.errors import ConfigurationError
from fourfold.loading.paths import ensure_reachable


@pytest.fixture
def mute_hub(monkeypatch: pytest.MonkeyPatch):
    """A hub that takes connections and never answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_no_folder_and_no_hub(name: str, mute_hub: None) -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigurationError, match=f"no folder {name}.* and the hub cannot be asked") as caught:
        ensure_reachable(name)
    assert time.perf_counter() - started < 10
    assert caught.value.exit_status == 2


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set"):
        ensure_reachable("nobody/no-such-model")


def test_what_is_there_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mute_hub: None) -> None:
    ensure_reachable(tmp_path)
    ensure_reachable(tmp_path / "nowhere")  # a path for certain: whoever reads it says so
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    ensure_reachable("somebody/model")


def test_any_answer_of_the_hub_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 5

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    ensure_reachable("nobody/no-such-model")
