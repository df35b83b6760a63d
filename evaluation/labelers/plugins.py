"""Objects named as "package.module:attribute"."""

import importlib
import inspect
from typing import Any


def import_attribute(spec: str, what: str, known: str) -> Any:
    """The object that `spec` names.

    Args:
        spec: "package.module:attribute"; the attribute may have dots.
        what: what it should be, for messages, such as "labeller".
        known: the names that there are.

    Raises:
        ValueError: there is no such module or attribute, or importing it fails.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"There is no {what} {spec!r}; known are {known}.")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        # A module that is there but lacks something of its own needs another remedy than a name that is wrong.
        missing = error.name
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ValueError(
                f"The {what} {spec!r} cannot be loaded: there is no module {missing!r}. Install its package or put "
                f"its folder on PYTHONPATH; known are {known}."
            ) from error
        raise ValueError(f"The {what} {spec!r} cannot be loaded: importing {module_name} failed: {error}.") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"The {what} {spec!r} cannot be loaded: {module_name} has no attribute {attribute!r}.")
        found = getattr(found, name)
    return found


def call_factory(spec: str, factory: Any, device: str, what: str) -> Any:
    """What a class or function without required arguments makes; `device` is passed if it has such a parameter.

    Raises:
        ValueError: it needs other arguments.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some built-in functions tell no signature
        parameters = {}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name != "device"
    ]
    if needed:
        raise ValueError(
            f"{spec!r} is no {what}, and what makes one must not need arguments (it needs: {', '.join(needed)})."
        )
    return factory(device=device) if "device" in parameters else factory()
