"""Things that configs name as text."""

import pkgutil
from typing import Any


def resolve(name: str) -> Any:
    """The object that ``module:attribute`` names, importing the module.

    The look-up happens at launch, so a package that must not import another can run its parts.

    Raises:
        ValueError: the text has no colon, or the module or the attribute does not exist.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"{name!r} does not name an object: write module:attribute, "
            "as in train.tasks.language_model:LanguageModel."
        )
    try:
        return pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists and one of its own imports fails
        raise ValueError(f"{name!r}: there is no module {error.name}: check the name.") from error
    except AttributeError as error:
        raise ValueError(
            f"{name!r}: module {module} has no {attribute}: check the name."
        ) from error
