from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.dataset import LatentDataset

__all__ = ["LatentDataset"]


def __getattr__(name: str) -> Any:
    """LatentDataset is imported when it is asked for: manifests and orders need no torch."""
    if name == "LatentDataset":
        from pipeline.data.dataset import LatentDataset

        return LatentDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
