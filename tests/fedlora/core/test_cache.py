"""One cache folder, which a user can move."""

from fedlora.core.cache import cache_root


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("FEDLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fedlora"
