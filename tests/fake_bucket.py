"""`gs://` as a folder: etils through fsspec, without a network."""


def make_bucket(tmp_path, monkeypatch):
    """The folder that `gs://bucket` is from here on."""
    from etils.epath import backend, gpath
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", f"{tmp_path}/"))

        def glob(self, path, **kwargs):
            return [name.removeprefix(f"{tmp_path}/") for name in super().glob(path, **kwargs)]

        def ls(self, path, detail=False, **kwargs):
            found = super().ls(path, detail=detail, **kwargs)
            return found if detail else [str(name).removeprefix(f"{tmp_path}/") for name in found]

    Bucket.clear_instance_cache()
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: Bucket())
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"
