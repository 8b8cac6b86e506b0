"""The rungs of capture: dynamic batch and length; the same with opaque leaves; static sizes, to be looked at only.

1. `torch.export`, non-strict, batch and length dynamic; the graph must equal the model at other shapes.
2. Where that fails, the module to blame is found (`culprits`), stands opaque in the graph (`leaves`), and the export is
   tried again, as often as modules are found. A module that runs attention is never made opaque.
3. Where no module can be blamed: batch or length, or both, as they were traced. Such a program can be inspected; it
   runs at the traced shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from linearize.capture import culprits
from linearize.capture.calling import Call, LogitsOnly
from linearize.capture.checks import SHAPES, Mismatch
from linearize.capture.functional import functional
from linearize.capture.leaf_probe import check_stateless, mixes_tokens
from linearize.capture.leaf_shapes import learn_shapes
from linearize.capture.leaves import Leaf, Tracing, opaque, shared_copy
from linearize.capture.probing import (
    PROBES,
    first_line,
    needs_values,
    probe_inputs,
    quiet_export,
    safe_vocabulary,
    why_untraced,
)
from linearize.capture.recording import Call as ModuleCall
from linearize.capture.recording import Recording, recorded
from linearize.capture.restore import Snapshot
from linearize.capture.stand_in import stand_in_forward, valued_call, with_values
from linearize.errors import CaptureError
from linearize.program import TOKENS, Program

ROUNDS = 12
HELP = "make that module's control flow independent of tensor values and of batch and length"

Exported = torch.export.ExportedProgram
Finish = Callable[[Exported, Tracing, tuple[bool, bool]], Program]


@dataclass
class Ladder:
    """One model being captured. `finish` makes a Program of an export and checks it against the model."""

    wrapper: LogitsOnly
    call: Call
    finish: Finish
    leaves: dict[str, Leaf] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)
    last_failure: str = ""

    def __post_init__(self) -> None:
        self.model = self.wrapper.model
        self._snapshot = Snapshot(self.model)
        self._vocabulary = safe_vocabulary(self.model)
        self._without_weights = self.call.inputs[TOKENS].device.type == "meta"

    def climb(self) -> Program:
        """The program of the first rung that holds.

        Raises:
            CaptureError: none does; it names the module and the reason.
        """
        for _ in range(ROUNDS):
            try:
                return self._attempt((True, True))
            except Exception as error:
                failure: Exception = error
                if isinstance(error, CaptureError) and not isinstance(error, Mismatch):
                    raise
                if not self._make_leaves(error):
                    break
        if needs_values(failure):
            raise self._refusal(failure) from failure
        self.last_failure = str(self._refusal(failure))
        for dynamic in ((False, True), (True, False), (False, False)):
            try:
                return self._attempt(dynamic)
            except Exception:
                continue
        raise self._refusal(failure) from failure

    def _attempt(self, dynamic: tuple[bool, bool]) -> Program:
        dims = {dim: torch.export.Dim.DYNAMIC for dim in (0, 1) if dynamic[dim]}
        example = tuple(tensor.clone() for tensor in self.call.inputs.values())
        try:
            with quiet_export(), opaque(self.model, self.leaves) as tracing:
                shapes = ((dims,) * len(example),)
                exported = torch.export.export(self.wrapper, example, dynamic_shapes=shapes, strict=False)
                exported = functional(exported)
        finally:
            self._snapshot.restore()
        try:
            return self.finish(exported, tracing, dynamic)
        finally:
            self._snapshot.restore()

    # ---- leaves ------------------------------------------------------------------------------------------------------

    def _make_leaves(self, error: Exception) -> bool:
        """Whether a module was found that can stand opaque at the next try."""
        named = [name for name in culprits.on_traceback(error, self.model) if name not in self.leaves]
        if named and not isinstance(error, Mismatch):
            return self._first_that_can(named, why_untraced(error))
        found = self._smallest_failing(error)
        return any([self._first_that_can([name], why) for name, why in found.items()])

    def _first_that_can(self, names: Sequence[str], reason: str) -> bool:
        """Make the first of `names` (inner to outer) opaque that can be, and the model's other modules like it."""
        for name in names:
            group = [other for other in culprits.alike(self.model, name) if not self._covered(other)]
            try:
                made = self._learn([name, *(other for other in group if other != name)], reason)
            except CaptureError as refusal:
                self.why.append(str(refusal))
                continue
            self.leaves = {old: leaf for old, leaf in self.leaves.items() if not _below(old, made)} | made
            return True
        return False

    def _covered(self, name: str) -> bool:
        return name in self.leaves or _below(name, self.leaves)

    def _learn(self, names: list[str], reason: str) -> dict[str, Leaf]:
        runs = [self._record(names, shape, names) for shape in PROBES]
        called = [name for name in names if all(run.calls[name] for run in runs)]
        if names[0] not in called:
            raise CaptureError(f"{names[0]} is not called at every shape, so what it returns cannot be learned")
        made = {}
        for name in called:
            if any(run.attention[name] for run in runs):
                if name == names[0]:
                    raise CaptureError(f"{name} runs attention, so it cannot be left opaque")
                continue
            try:
                made[name] = self._leaf(name, runs, reason)
            except CaptureError as refusal:
                raise CaptureError(f"{name} cannot be left opaque: {refusal}") from refusal
        return made

    def _leaf(self, name: str, runs: list[Recording], reason: str) -> Leaf:
        calls = [run.calls[name] for run in runs]
        if len({len(each) for each in calls}) > 1:
            raise CaptureError("it is called another number of times at another shape")
        shapes = [learn_shapes(each) for each in zip(*calls, strict=True)]
        batch, length = PROBES[0]
        module, call = shared_copy(self.model.get_submodule(name), self.model), calls[0][0]
        runs_alone = with_values(module, module) if self._without_weights else module
        if not self._without_weights:
            check_stateless(shared_copy(module, module), [each[0] for each in calls])
        mixes, far = mixes_tokens(runs_alone, valued_call(call) if self._without_weights else call, batch, length)
        return Leaf(name, reason, shapes, module, mixes, far)

    def _record(self, names: Sequence[str], shape: tuple[int, int], opaque_names: Sequence[str] = ()) -> Recording:
        """One run of the model. Without weights, random ones stand in for those of what is, or shall be, opaque."""
        inputs = probe_inputs(list(self.call.inputs), *shape, self._vocabulary, self.call.inputs[TOKENS].device)
        try:
            if self._without_weights:
                for name in {*opaque_names, *self.leaves}:
                    module = self.model.get_submodule(name)
                    module.__dict__["forward"] = stand_in_forward(with_values(module, self.model))
            with recorded(self.model, names, shape[1]) as recording:
                self.wrapper(*inputs.values())
        except (RuntimeError, IndexError, ValueError) as error:
            where = "without weights its results cannot be learned" if self._without_weights else f"it fails at {shape}"
            raise CaptureError(f"{names[0] if names else 'the model'}: {where} ({first_line(error)})") from error
        finally:
            self._snapshot.restore()
        return recording

    # ---- bisection ---------------------------------------------------------------------------------------------------

    def _smallest_failing(self, error: Exception) -> dict[str, str]:
        """The smallest modules that cannot be traced alone, or whose graph alone is wrong at another shape; why."""
        shapes = [PROBES[0], *SHAPES]
        if isinstance(error, Mismatch) and error.shape not in shapes:
            shapes.append(error.shape)
        names = [name for name, module in self.model.named_modules() if name and not culprits.is_elementary(module)]
        called = {name for name, calls in self._record(names, PROBES[0]).calls.items() if calls}
        found: dict[str, str] = {}
        self._descend("", shapes, called, found, {})
        return found

    def _descend(
        self,
        name: str,
        shapes: list[tuple[int, int]],
        called: set[str],
        found: dict[str, str],
        known: dict[tuple[tuple[str, type], ...], str],
    ) -> bool:
        """Whether something below `name` fails alone; the smallest such modules enter `found`."""
        children = [child for child in culprits.called_children(self.model, name, called) if not self._covered(child)]
        runs = [self._record(children, shape) for shape in shapes] if children else []
        any_failed = False
        for child in children:
            shape = culprits.structure(self.model.get_submodule(child))
            if shape not in known:
                calls = [run.calls[child][0] for run in runs if run.calls[child]]
                known[shape] = self._fails_alone(child, calls)
                if known[shape] and not self._descend(child, shapes, called, found, known):
                    found[child] = known[shape]
            any_failed = any_failed or bool(known[shape])
        return any_failed

    def _fails_alone(self, name: str, calls: Sequence[ModuleCall]) -> str:
        try:
            with opaque(self.model, self.leaves):
                return culprits.why_not_alone(self.model.get_submodule(name), calls)
        finally:
            self._snapshot.restore()

    # ---- telling -----------------------------------------------------------------------------------------------------

    def _refusal(self, failure: Exception) -> CaptureError:
        if isinstance(failure, Mismatch):
            return CaptureError("; ".join([str(failure), *dict.fromkeys(self.why)]))
        named = culprits.on_traceback(failure, self.model)
        place = f" in module {named[0]!r}" if named else ""
        why = "; ".join([first_line(failure), *dict.fromkeys(self.why), HELP])
        return CaptureError(f"torch.export cannot trace {type(self.model).__name__}{place}: {why}")


def _below(name: str, others: dict[str, Leaf]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)
