"""Functions of the user's own, named as module:function on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from pcpo_fast.errors import SettingError, describe_error
from pcpo_fast.isolation import kept_globals


def import_function(spec: str, setting: str) -> Callable[..., Any]:
    """The function of `module:function`; modules of the current folder count, as for `python -m`.

    Raises:
        SettingError: with the name `setting`, for a module that cannot be imported or has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise SettingError(setting, f"{spec!r} names no function; give module:function, such as my_module:my_function")
    # a console script does not look there. At the end: a folder such as kernels/ must not hide an installed package
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        with kept_globals():
            module = importlib.import_module(module_name)
            function = getattr(module, function_name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise SettingError(
                setting,
                f"{spec!r} needs the module {error.name!r}, which cannot be imported; install it, or run from the "
                "folder that holds it",
            ) from error
        raise SettingError(
            setting, f"the module {module_name!r} of {spec!r} cannot be imported: {describe_error(error)}"
        ) from error
    if function is None:
        raise SettingError(setting, f"{spec!r}: the module {module_name!r} has no function {function_name!r}")
    if not callable(function):
        raise SettingError(
            setting, f"{spec!r} is a {type(function).__name__}, which cannot be called; name a function of the module"
        )
    return function
