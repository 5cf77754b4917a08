"""Names for the functions of a forward pass: the path of the module that calls them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


class ModuleNames:
    """Notes which module of a model runs, and gives names to the functions that it calls.

    A function's name is the path of the innermost module that runs: `layer1.0.conv1`. The second and later runs of a
    module are `conv#2`, `conv#3`, ... If one run of a module calls several functions that may have a bias, their names
    follow: `layer1.0.se:sigmoid`, and for several calls of one function `layer1.0:add`, `layer1.0:add#2`, ...
    The second and later outputs of a function are `lstm[1]`, ... Functions outside of all children have no path.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._runs: Counter[str] = Counter()
        self._running: list[str] = []
        self._calls: list[tuple[str, str, int]] = []  # run of a module, function, output

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the modules of the model by hooks, which are removed on leaving."""
        with ExitStack() as undo:
            for path, module in self._model.named_modules():
                enter = module.register_forward_pre_hook(self._entering(path), prepend=True)
                leave = module.register_forward_hook(self._leave, always_call=True)
                undo.callback(enter.remove)
                undo.callback(leave.remove)
            yield

    def _entering(self, path: str):
        def enter(*_: object) -> None:
            self._runs[path] += 1
            run = self._runs[path]
            self._running.append(path if run == 1 else f"{path}#{run}")

        return enter

    def _leave(self, *_: object) -> None:
        self._running.pop()

    @property
    def running(self) -> str:
        """The run of a module that is going on."""
        return self._running[-1] if self._running else ""

    def note(self, function: str, output: int) -> int:
        """Note an output of a function. Returns its index in `names`."""
        self._calls.append((self.running, function, output))
        return len(self._calls) - 1

    def names(self) -> list[str]:
        """Return the name of each output that was noted."""
        functions = Counter(run for run, _, output in self._calls if output == 0)
        calls: Counter[tuple[str, str]] = Counter()
        names = []
        for run, function, output in self._calls:
            if output == 0:
                calls[run, function] += 1
            name = function if not run else run if functions[run] == 1 else f"{run}:{function}"
            if calls[run, function] > 1:
                name += f"#{calls[run, function]}"
            names.append(name if output == 0 else f"{name}[{output}]")
        return names
