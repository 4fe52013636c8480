from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifact.test_directory import finish
from trtqwen.artifact.manifest import cached, read_manifest, stage_key
from trtqwen.diagnostics import InputError


def test_an_unfinished_or_changed_directory_is_not_accepted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="is not a finished engine"):
        read_manifest(out, "engine")
    out.rmdir()
    finish(out)
    with pytest.raises(InputError, match="holds a finished engine, not a checkpoint"):
        read_manifest(out, "checkpoint")
    (out / "file").write_text("longer")
    with pytest.raises(InputError, match="has 6 bytes instead of 1"):
        read_manifest(out, "engine")
    (out / "file").unlink()
    with pytest.raises(InputError, match="out: file is missing"):
        read_manifest(out, "engine")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is not a manifest"):
        read_manifest(out, "engine")


def test_a_cached_result_is_one_with_the_same_key(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    key = stage_key("engine", {"source": "1"}, {"size": 2})
    assert cached(tmp_path / "out", "engine", key)
    assert not cached(tmp_path / "out", "engine", stage_key("engine", {"source": "2"}, {"size": 2}))
    assert not cached(tmp_path / "none", "engine", key)
