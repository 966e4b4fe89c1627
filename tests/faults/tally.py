"""The figures that ``make test-faults`` prints at its end: one tally over all the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """``injected`` counts faults that really happened; a mutant is a safeguard taken away, which a test must notice."""

    injected: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    silent: int = 0
    tracebacks: int = 0
    mutants: int = 0
    caught: int = 0

    def add(self, kind: str, count: int = 1) -> None:
        self.injected[kind] = self.injected.get(kind, 0) + count

    def mutant(self, caught: bool) -> bool:
        self.mutants += 1
        self.caught += caught
        return caught

    def merge(self, other: Tally) -> None:
        for kind, count in other.injected.items():
            self.add(kind, count)
        for name in ("lost", "silent", "tracebacks", "mutants", "caught"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def lines(self) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.injected.items()))
        return [
            f"({kinds})",
            f"faults injected {sum(self.injected.values())}, lost {self.lost}, silent {self.silent}, "
            f"tracebacks {self.tracebacks}, mutants caught {self.caught}/{self.mutants}",
        ]


TALLY = Tally()
