"""What modules of `evaluate` do not do themselves: nothing to score, and lists of different length."""

from collections.abc import Sequence
from typing import Any


class CheckedBatches:
    """
    Mixed into a module, in front of `evaluate.Metric`. That takes an empty list beside a full one for nothing to score
    and looks at the first entry to tell several input formats apart.
    """

    def add_batch(self, *, predictions: Sequence | None = None, references: Sequence | None = None, **more) -> None:
        """As in `evaluate.Metric`.

        Raises:
            ValueError: for lists of different length.
        """
        given = {"predictions": predictions, "references": references, **more}
        lengths = {name: len(column) for name, column in given.items() if column is not None}
        if len(set(lengths.values())) > 1:
            found = " and ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(f"The lists differ in length: {found}; give one of each.")
        super().add_batch(**given)

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> Any:
        if isinstance(self.features, list) and not all(len(column) for column in batch.values()):
            return self.features[0]
        return super()._infer_feature_from_batch(batch)


__all__ = ["CheckedBatches"]
