"""What compiling did, as data: errors per layer, kernels, bytes, seconds. The CLI draws it, `save` keeps it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SiteReport(BaseModel):
    """One site. Errors are relative MSE: mean (y' - y)^2 over the variance of the teacher's output y, held out data;
    `error_closed` after what is found without gradient steps, `error_fitted` at the end."""

    model_config = ConfigDict(extra="forbid")

    site: int
    module: str
    mixer: str
    reason: str = ""
    error_start: float | None = None
    error_closed: float | None = None
    error_fitted: float | None = None
    parameters: int = 0
    seconds: float = 0.0


class EndToEndReport(BaseModel):
    """What distilling the whole model did: mean KL(teacher || student) in nats a token on held-out data, before and
    after. `kept` is false where nothing on the way was better than the start, whose weights then stay."""

    model_config = ConfigDict(extra="forbid")

    tokens: int
    steps: int
    kl_start: float
    kl_end: float
    kept: bool
    trained: str
    parameters: int
    seconds: float = 0.0


class Report(BaseModel):
    """Everything measured while compiling one model.

    `kernels`: for each operator node, the kernel that is asked first; `declined`: kernels of these operators that this
    machine cannot use, and why. Which kernel a call took depends on its sizes: `linearize.kernels.recording` says.
    `processes`: that fitted it together.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: str = ""
    seed: int = 0
    processes: int = 1
    tokens_fitted: int = 0
    tokens_held_out: int = 0
    data: str = ""
    sites: list[SiteReport] = Field(default_factory=list)
    end_to_end: EndToEndReport | None = None
    refused: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    kernels: dict[str, str] = Field(default_factory=dict)
    declined: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)

    def mean_error(self, fitted: bool = True) -> float | None:
        """Mean relative MSE over the sites that were measured, or None without any."""
        found = [site.error_fitted if fitted else site.error_start for site in self.sites]
        return _mean(found)

    def mean_error_closed(self) -> float | None:
        """The same after the closed form, over the sites that have one."""
        return _mean([site.error_closed for site in self.sites])


def _mean(found: list[float | None]) -> float | None:
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None
