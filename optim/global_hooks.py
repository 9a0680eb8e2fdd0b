"""Hooks that torch runs around the steps of all optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import optimizer as torch_optimizer

_inside: list[int] = []  # threads
_lock = threading.Lock()


class _Elsewhere:
    """A hook that does not run in threads inside :func:`global_hooks_off`."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if threading.get_ident() in _inside else self.hook(*args)


@contextmanager
def global_hooks_off() -> Iterator[None]:
    """Inside, hooks by ``register_optimizer_step_pre_hook`` and its like do not run in this thread.

    They run around the wrapper's step, on the parameters; in the base's, which is made several
    times and on twins, what they change would pass for the gradient or the direction.
    """
    thread = threading.get_ident()
    with _lock:
        _inside.append(thread)
        _map(lambda hook: hook if isinstance(hook, _Elsewhere) else _Elsewhere(hook))
    try:
        yield
    finally:
        with _lock:
            _inside.remove(thread)
            if not _inside:
                _map(lambda hook: hook.hook if isinstance(hook, _Elsewhere) else hook)


def _map(change: Callable[[Any], Any]) -> None:
    for hooks in (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ):
        # No entry comes or goes, since other threads may be on their way through.
        for key, hook in list(hooks.items()):
            hooks[key] = change(hook)
