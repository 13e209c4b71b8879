"""The part of Ray that stage one uses, in this process and in a fixed order, for tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class RayError(Exception):
    """An actor died."""


class PreemptedError(RayError):
    """An actor died because its node was preempted; of Ray's own errors, `ActorDiedError`."""

    preempted = True


class RayTaskError(RayError):
    """A task raised an error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(eq=False)
class Call:
    """A call of an actor's method; `InProcessRay.wait` runs it."""

    actor: Any
    method: str
    arguments: tuple[Any, ...]
    outcome: Any = None


@dataclass(eq=False)
class Handle:
    """An actor."""

    ray: "InProcessRay"
    actor: Any

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


@dataclass
class Method:
    """A method of an actor."""

    handle: Handle
    name: str

    def options(self, **options: Any) -> "Method":
        return self

    def remote(self, *arguments: Any) -> Call:
        return Call(self.handle.actor, self.name, arguments)


@dataclass(eq=False)
class InProcessRay:
    """Stands for the module `ray`; `before` is called before each call and may raise its error."""

    num_cpus: int = 2
    before: Callable[[Call], None] = lambda call: None
    killed: list[bool] = field(default_factory=list)
    """For each killed actor, whether it ended for good."""
    exceptions = type("exceptions", (), {"RayError": RayError, "RayTaskError": RayTaskError})

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self.num_cpus)}}]

    def remote(self, cls: Callable[..., Any]) -> Any:
        def options(**_: Any) -> Any:
            return type("Actor", (), {"remote": lambda self, *args: Handle(ray, cls(*args))})()

        ray = self
        return type("Remote", (), {"options": staticmethod(options)})

    def wait(
        self, calls: list[Call], num_returns: int, timeout: float
    ) -> tuple[list[Call], list[Call]]:
        call = calls[-1]  # actors that load come last: all of them are used
        try:
            self.before(call)
            call.outcome = getattr(call.actor, call.method)(*call.arguments)
        except RayError as error:
            call.outcome = error
        except Exception as error:  # noqa: BLE001 - as Ray does
            call.outcome = RayTaskError(error)
        return [call], calls[:-1]

    def get(self, call: Call) -> Any:
        if isinstance(call.outcome, RayError):
            raise call.outcome
        return call.outcome

    def kill(self, handle: Handle, no_restart: bool = True) -> None:
        self.killed.append(no_restart)
