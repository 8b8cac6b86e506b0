"""Opaque leaves on disk: modules of transformers, made again of the saved config by the transformers that is installed.

A leaf's Python code is never saved. What is saved is its class's name, to be found where the model's class has it, its
tensors, and what the graph knows of it (its shapes, whether it mixes tokens). So only leaves of transformers' own
classes can be saved; no code from a model's repository is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from linearize.capture.hf import made_of_config
from linearize.capture.leaf_shapes import DimRule, LeafShapes, OutputRule, Source
from linearize.errors import ArtifactError
from linearize.program import LEAF, Program

LIBRARY = "transformers."
CLASS = "class"


def check_leaves(program: Program) -> None:
    """That every leaf can be made again.

    Raises:
        ArtifactError: naming the leaves, and what stands in the way.
    """
    if not program.leaves:
        return
    try:
        model = made_of_config(program.model_name, program.source_config)
        for name in program.leaves:
            _check_leaf(program.module.get_submodule(name), _found(model, name))
    except ArtifactError as error:
        raise ArtifactError(
            f"{program.model_name} cannot be saved: {', '.join(program.leaves)} could not be traced and run the "
            f"source's Python code, which no saved model may hold ({error}); keep the compiled model in memory, or "
            "rewrite these modules without control flow that depends on values or lengths"
        ) from error


def _check_leaf(ours: nn.Module, theirs: nn.Module) -> None:
    own, made = _class_name(ours), _class_name(theirs)
    if own != made or not own.startswith(LIBRARY):
        raise ArtifactError(f"it is a {own}, where transformers makes a {made} from the config")
    for name, part in ours.named_modules():
        if "forward" in part.__dict__:
            raise ArtifactError(f"the forward of its {name or 'module'} was replaced")
        if any(isinstance(value, Tensor) for value in part.__dict__.values()):
            raise ArtifactError(f"its {name or 'module'} holds a tensor that is neither parameter nor buffer")
    shapes = [{name: tuple(t.shape) for name, t in leaf_tensors(leaf)} for leaf in (ours, theirs)]
    if shapes[0] != shapes[1]:
        first = min(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ArtifactError(f"its {first} is not as transformers makes it from the config")


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def leaf_tensors(leaf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, those included that a state dict leaves out: they are not computed again."""
    yield from leaf.named_parameters(remove_duplicate=False)
    yield from leaf.named_buffers(remove_duplicate=False)


def _found(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArtifactError(f"the {type(model).__name__} that transformers makes has no {name}") from None


# ---- in graph.json ---------------------------------------------------------------------------------------------------


def leaf_to_json(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    """What `node.meta` knows of a leaf."""
    facts = dict(node.meta[LEAF])
    shapes: LeafShapes = facts.pop("outputs")
    rules = [_rule_to_json(rule) if isinstance(rule, OutputRule) else {"constant": rule} for rule in shapes.outputs]
    row = {CLASS: _class_name(module), **facts, "rules": rules}
    try:
        return {**json.loads(json.dumps(row)), "spec": pytree.treespec_dumps(shapes.spec)}
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ArtifactError(f"{node.target} returns what JSON has no form for: {error}") from error


def _rule_to_json(rule: OutputRule) -> dict[str, Any]:
    dims = [
        {"sources": [[s.index, s.dim] for s in dim.sources], "factor": dim.factor, "offset": dim.offset}
        for dim in rule.dims
    ]
    return {"dims": dims, "dtype": str(rule.dtype).removeprefix("torch."), "order": list(rule.order)}


def leaf_from_json(row: dict[str, Any]) -> dict[str, Any]:
    """The node's facts again.

    Raises:
        ArtifactError: they are malformed.
    """
    try:
        rules = tuple(rule["constant"] if "constant" in rule else _rule_from_json(rule) for rule in row["rules"])
        shapes = LeafShapes(rules, pytree.treespec_loads(row["spec"]))
        facts = {key: row[key] for key in ("mixes_tokens", "far_positions", "reason")}
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ArtifactError(f"graph.json: the shapes of a module are malformed: {error!r}") from error
    return {**facts, "outputs": shapes}


def _rule_from_json(row: dict[str, Any]) -> OutputRule:
    dims = tuple(
        DimRule(tuple(Source(index, dim) for index, dim in d["sources"]), d["factor"], d["offset"]) for d in row["dims"]
    )
    dtype = getattr(torch, row["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"unknown dtype {row['dtype']!r}")
    return OutputRule(dims, dtype, torch.device("cpu"), tuple(row["order"]))


# ---- back from disk --------------------------------------------------------------------------------------------------


def add_leaves(
    root: nn.Module,
    rows: dict[str, dict[str, Any]],
    model_name: str,
    config: dict[str, Any] | None,
    tensor: Callable[[str], Tensor | None],
) -> None:
    """Put the modules named in `rows` into `root`, over the stored tensors (`tensor(name)`, None where there is none).

    Raises:
        ArtifactError: the installed transformers makes other modules of the config, or a tensor is missing.
    """
    if not rows:
        return
    model = made_of_config(model_name, config)
    for name, row in rows.items():
        leaf = _found(model, name)
        if _class_name(leaf) != row.get(CLASS):
            raise ArtifactError(f"{name} was saved as a {row.get(CLASS)}; transformers now makes a {_class_name(leaf)}")
        _fill(leaf, name, tensor)
        _put(root, name, leaf)


def _fill(leaf: nn.Module, name: str, tensor: Callable[[str], Tensor | None]) -> None:
    for path, part in leaf.named_modules(prefix=name):
        for kind in (part._parameters, part._buffers):
            for key, placeholder in kind.items():
                if placeholder is None:
                    continue
                found = tensor(f"{path}.{key}")
                if found is None or found.shape != placeholder.shape:
                    raise ArtifactError(f"the weights lack {path}.{key} of shape {list(placeholder.shape)}")
                kind[key] = found  # type: ignore[assignment]


def _put(root: nn.Module, name: str, leaf: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(last, leaf)
