"""Models in diffusers' format: a folder, an s3:// prefix or a hub id, of one model or of a pipeline that has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError, StorageError
from pipeline.storage import fetch_folder, local_path, open_store, temporary_folder

CONFIG = "config.json"


@dataclass(frozen=True)
class Part:
    """A kind of model, and where pipelines have it.

    Args:
        kind: diffusers' class.
        folder: its name in that of a whole pipeline.
        what: what errors call it.
    """

    kind: Any
    folder: str
    what: str

    def load(self, url: str) -> Any:
        """The model, in float32, from safetensors.

        Raises:
            StorageError: the place cannot be read.
            DataError: there is no such model, or its files cannot be used.
        """
        with self._find(url) as folder:
            if folder is None:
                return self._checked(self._from_hub(url), url)
            try:
                return self._checked(self._from_pretrained(str(folder), local_files_only=True), url)
            except DataError:
                raise
            except Exception as error:  # diffusers raises a dozen unrelated kinds
                remedy = f"check that it is a whole {self._name} in diffusers' format, with safetensors weights"
                raise DataError(f"{self.what} {url} cannot be loaded: {_first_line(error)}", remedy) from error

    def config(self, url: str) -> dict[str, Any]:
        """What its config.json says. Raises as `load`."""
        with self._find(url, CONFIG) as folder:
            if folder is None:
                return self._config_from_hub(url)
            try:
                tree = json.loads((folder / CONFIG).read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"{self.what} {url}: {CONFIG} cannot be read: {error}", "fetch it again") from error
            if not isinstance(tree, dict) or tree.get("_class_name", self._name) != self._name:
                raise DataError(
                    f"{self.what} {url}: {CONFIG} is not that of {self._name}",
                    f"give the folder of one {self._name} in diffusers' format, or of a pipeline that has one",
                )
            return tree

    @property
    def _name(self) -> str:
        return str(self.kind.__name__)

    @contextmanager
    def _find(self, url: str, file: str = "") -> Iterator[Path | None]:
        """The local folder with config.json, for as long as the context lasts; None for what may be a hub id.

        Args:
            url: where the model or the pipeline is.
            file: of an s3:// prefix, fetch this file alone; "" = all.
        """
        if "://" in url:
            store, part = open_store(url), f"{self.folder}/{CONFIG}"
            whole_pipeline = not store.exists(CONFIG) and store.exists(part)
            place = f"{url.rstrip('/')}/{self.folder}" if whole_pipeline else url
            with temporary_folder(self.folder) as temporary:
                if file and (store := open_store(place)).exists(file):
                    store.download(file, temporary / file)
                    yield temporary
                else:
                    yield self._with_config(fetch_folder(place, temporary), url)
            return
        folder = local_path(url)
        try:
            is_there = folder.is_dir()
        except OSError as error:
            raise StorageError(f"{self.what} {url}: {error.strerror}", "check the path and its permissions") from error
        if not is_there and (url.startswith((".", "/", "~")) or url.count("/") != 1):
            raise DataError(
                f"{self.what} {url}: no such folder", "give a folder, an s3:// prefix or a hub id (owner/name)"
            )
        yield self._with_config(folder, url) if is_there else None

    def _with_config(self, folder: Path, url: str) -> Path:
        found = next((place for place in (folder, folder / self.folder) if (place / CONFIG).is_file()), None)
        if found is None:
            raise DataError(
                f"{self.what} {url}: the folder has no {CONFIG}, nor {self.folder}/{CONFIG}",
                f"give the folder of one {self._name} in diffusers' format, or of a pipeline that has one",
            )
        return found

    def _from_hub(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        try:
            return self._from_pretrained(name)
        except Exception as error:  # the hub client adds its own kinds
            try:
                return self._from_pretrained(name, subfolder=self.folder)
            except Exception:
                raise self._not_on_hub(name, error) from error

    def _config_from_hub(self, name: str) -> dict[str, Any]:
        try:
            return dict(self.kind.load_config(name))
        except Exception as error:
            try:
                return dict(self.kind.load_config(name, subfolder=self.folder))
            except Exception:
                raise self._not_on_hub(name, error) from error

    def _not_on_hub(self, name: str, error: Exception) -> DataError:
        return DataError(
            f"{self.what} {name} cannot be loaded: {_first_line(error)}",
            "no such folder here; a hub id needs a network: check it, or download the model and give its folder",
        )

    def _from_pretrained(self, place: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
        return self.kind.from_pretrained(  # type: ignore[no-any-return]
            place, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )

    def _checked(self, loaded: tuple[Any, dict[str, list[str]]], url: str) -> Any:
        """The model, where every weight was there: diffusers makes up what is missing, and only warns."""
        model, info = loaded
        for what, kind in (("lack", "missing_keys"), ("have a strange", "unexpected_keys")):
            if names := info[kind]:
                raise DataError(
                    f"{self.what} {url}: its weights {what} {names[0]}" + (" and more" if len(names) > 1 else ""),
                    f"check that config.json and weights belong together, and are those of one {self._name}",
                )
        return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
