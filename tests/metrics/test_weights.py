"""Weight files: found in torch's cache, downloaded, or refused with what to do."""

import hashlib

import pytest
import torch

from dbcache.metrics.weights import (
    BACKBONES,
    HEADS,
    INCEPTION,
    WeightFile,
    WeightsError,
    read_tensors,
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DBCACHE_METRICS_WEIGHTS", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def published(path, sha256=None, **names) -> WeightFile:
    """A file as it is published, at an address of this machine."""
    torch.save({"x": torch.arange(3.0)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WeightFile(path.name, path.as_uri(), sha256 or digest[:8], **names)


def test_a_file_is_downloaded_once_and_checked(hub, tmp_path):
    file = published(tmp_path / "heads.pth", cached_as="lpips_heads.pth")
    found = file.find(None, "x")
    assert found == hub / "lpips_heads.pth"
    assert read_tensors(found, "x")["x"].tolist() == [0, 1, 2]
    (tmp_path / "heads.pth").unlink()
    assert file.find(None, "x") == found


def test_a_file_with_another_hash_is_refused(hub, tmp_path):
    file = published(tmp_path / "heads.pth", sha256="00000000")
    with pytest.raises(WeightsError, match=r"x: file://.* could not be downloaded .*hash"):
        file.find(None, "x")
    assert list(hub.iterdir()) == []


def test_a_download_that_fails_says_where_to_put_the_file(hub, tmp_path):
    address = (tmp_path / "absent.pth").as_uri()
    with pytest.raises(WeightsError, match=r"--weights or the variable DBCACHE_METRICS_WEIGHTS"):
        WeightFile("absent.pth", address, "").find(None, "x")


def test_a_folder_that_is_named_is_never_left(hub, tmp_path, monkeypatch):
    file = published(tmp_path / "a.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"x: needs a\.pth in .*empty, not found"):
        file.find(tmp_path / "empty", "x")
    monkeypatch.setenv("DBCACHE_METRICS_WEIGHTS", str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match="not found"):
        file.find(None, "x")
    monkeypatch.setenv("DBCACHE_METRICS_WEIGHTS", str(tmp_path))
    assert file.find(None, "x") == tmp_path / "a.pth"


@pytest.mark.parametrize("file", [INCEPTION, *BACKBONES.values()], ids=lambda file: file.name)
def test_published_names_carry_the_start_of_their_hash(file):
    assert file.name.endswith(f"-{file.sha256}.pth")
    assert file.url.endswith(file.name)


def test_names_in_the_cache_are_unique():
    files = [INCEPTION, *BACKBONES.values(), *HEADS.values()]
    assert len({file.cached_as or file.name for file in files}) == len(files)
