"""Positions of a sample's tokens as the model numbers them itself, made where samples are made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_dist.errors import ModelError

# Shapes: T tokens of one sample


class RopeIndex:
    """Calls the `get_rope_index` of a model's class without a model: it reads the configuration alone. Picklable.

    Used for packed rows, where the model cannot number the tokens itself: it would take the row for one sample. And for
    padded ones, where it would have to bring the sizes of pictures back from the device in the midst of a step.

    Args:
        config: of the model, as `AutoConfig` loads it.

    Raises:
        ModelError: the class that the configuration belongs to has no such method.
    """

    def __init__(self, config: Any) -> None:
        from transformers import MODEL_MAPPING

        model_class = MODEL_MAPPING.get(type(config), None)
        if not hasattr(model_class, "get_rope_index"):
            raise ModelError(
                f"models of type {config.model_type!r} do not tell how they number the tokens of images and videos "
                "(no get_rope_index), so that their samples cannot be packed; set train.packing to false"
            )
        self._config = config
        self._model_class: Any = model_class

    def __call__(self, tokens: Mapping[str, Tensor], visual: Mapping[str, Tensor]) -> Tensor:
        """Number the tokens of one sample.

        Args:
            tokens: keys with one entry per token, [T] each.
            visual: the other keys (`image_grid_thw` and the like).

        Returns:
            int64 [3, T]: time, height and width.
        """
        model = object.__new__(self._model_class)  # not initialised: there are no weights, and none are needed
        model.__dict__["config"] = self._config
        known = inspect.signature(self._model_class.get_rope_index).parameters
        arguments = {key: value.unsqueeze(0) for key, value in tokens.items() if key in known}
        arguments |= {key: value for key, value in visual.items() if key in known}
        arguments.pop("attention_mask", None)  # one sample without padding
        positions: Tensor = self._model_class.get_rope_index(model, **arguments)[0]
        return positions[:, 0]


def load_rope_index(model_id: str, revision: str | None = None, trust_remote_code: bool = False) -> RopeIndex:
    """Read a model's configuration and make its `RopeIndex`.

    Raises:
        ModelError: see `RopeIndex`.
    """
    from transformers import AutoConfig

    return RopeIndex(
        AutoConfig.from_pretrained(model_id, revision=revision or "main", trust_remote_code=trust_remote_code)
    )
