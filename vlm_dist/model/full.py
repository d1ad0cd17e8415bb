"""Training parameters of the model itself: in place, without the copy that PEFT's own wrapper would keep.

A second copy doubles the memory of a tower, and breaks under ZeRO-3. What is saved is nevertheless PEFT's
`modules_to_save`, so that `PeftModel.from_pretrained` needs none of our code.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from vlm_dist.errors import ModelError
from vlm_dist.model.towers import Towers, is_within, policy_of, tower_of, without_gradient

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def named_modules_to_train(model: nn.Module, modules_to_save: Sequence[str], towers: Towers) -> list[str]:
    """Full names of the modules that `modules_to_save` means, by name or end of name.

    Raises:
        ModelError: a name matches nothing, or only what never gets a gradient.
    """
    unread = without_gradient(model, towers)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: list[str] = []
    for wanted in modules_to_save:
        matching = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if not matching:
            ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            nearest = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], ends, n=1)
            mean = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ModelError(
                f"peft.modules_to_save: {wanted!r} matches no module of the model.{mean} Ends of names that exist: "
                f"{', '.join(ends)}."
            )
        if all(is_within(name, unread) for name in matching):
            raise ModelError(
                f"peft.modules_to_save: {wanted!r} matches only {', '.join(matching[:3])}, which nothing reads: it "
                "would never learn; remove it"
            )
        found += matching
    return found


def full_parameters(
    model: nn.Module, policy: Mapping[str, str], modules: Collection[str], towers: Towers
) -> list[nn.Parameter]:
    """What is trained in place: towers with policy full, and single modules.

    Left out are parameters that never get a gradient: Adam would only let weight decay shrink them.

    Args:
        model: without adapter.
        policy: tower -> "freeze", "lora" or "full".
        modules: full names.
        towers: of the model.

    Raises:
        ModelError: nothing is left of a tower with policy full.
    """
    unread = without_gradient(model, towers)
    chosen: dict[int, nn.Parameter] = {}
    reached: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied head has two names
        tower = tower_of(name, towers)
        if not parameter.is_floating_point() or is_within(name, unread):
            continue
        if policy_of(tower, policy) == "full" or is_within(name, modules):
            chosen[id(parameter)] = parameter
            reached.add(tower)
    empty = [tower for tower, value in policy.items() if value == "full" and tower not in reached]
    if empty:
        raise ModelError(f"peft towers: {', '.join(empty)}: full, but the model has no such parameters; say freeze")
    return list(chosen.values())


def listed_modules(model: nn.Module, trained: Collection[str]) -> list[str]:
    """The modules that `modules_to_save` of an adapter_config.json lists: the smallest that hold these parameters.

    PEFT makes a copy of each and wants all its weights in the file. So a module is listed if all that it holds was
    trained; its children are then part of it. What cannot be listed is left to the caller: a parameter of the model
    itself (`image_newline`), or a trained bias beside a frozen weight.

    Args:
        model: the base model, maybe with LoRA layers in it.
        trained: names of parameters that were trained in place; all of them, where some have several.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = dict.fromkeys(name.rpartition(".")[0] for name in trained)
    whole = [owner for owner in owners if owner and _is_whole(owner, modules, set(trained))]
    return [name for name in whole if not is_within(name, set(whole) - {name})]


def _is_whole(owner: str, modules: Mapping[str, nn.Module], trained: Collection[str]) -> bool:
    """Whether PEFT can copy this module, and finds every weight of it among what was trained."""
    module = modules[owner]
    # PEFT matches ends of names without regard for the dots
    also = [name for name in modules if name.endswith(owner) and name != owner]
    weights = {f"{owner}.{key}" for key in module.state_dict(keep_vars=True)}
    return not isinstance(module, _CONTAINERS) and not also and weights <= set(trained)


def freeze_all_but(model: nn.Module, kept: Iterable[nn.Parameter]) -> None:
    """Train these parameters and no other."""
    model.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
