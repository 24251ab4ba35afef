"""Loops of a model that do nothing but call their blocks, so that they may end early.

On a cached step the blocks between the first and the last middle one return what they are given,
and what the loop does in between is discarded. If the source of the loop shows that this is all,

    for index, block in enumerate(self.blocks):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(block, x, temb)
        else:
            x = block(x, temb)
        if residuals is not None:                       # an input that the model is not given
            x = x + residuals[index]

it need not be gone through. Whatever else is in the body, the loop runs to its end.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

CHECKPOINT = "_gradient_checkpointing_func"
"""Method of diffusers' models that calls a block so that autograd runs it again."""

PlainLoops = Mapping[str, frozenset[str]]
"""Inputs of the model without which a loop only calls blocks, by the attribute it goes through."""


def plain_loops(forward: Callable[..., Any]) -> PlainLoops:
    """Return the loops of a model's `forward` that only call blocks, if some inputs are missing."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return _of_code(code) if isinstance(code, CodeType) else {}


def source_of(code: Any) -> ast.stmt | None:
    """Return the source of a function or its code; None without: made at run time, a lambda."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def _of_code(code: CodeType) -> PlainLoops:
    function = source_of(code)
    is_method = isinstance(function, ast.FunctionDef) and function.args.args
    return _Source(function).plain_loops() if is_method else {}


class _Source:
    """The source of a forward, as far as it says what its loops over blocks do."""

    def __init__(self, function: Any) -> None:
        self._function = function
        nodes = [*ast.walk(function)]
        given = function.args
        self._model = given.args[0].arg
        self._loops = [node for node in nodes if isinstance(node, ast.For)]
        stored = {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        self._inputs = {each.arg for each in (*given.args, *given.kwonlyargs)} - stored
        inside = {id(node) for loop in self._loops for node in ast.walk(loop)}
        outside = [node for node in nodes if id(node) not in inside]
        self._read_outside = {node.id for node in outside if isinstance(node, ast.Name)}

    def plain_loops(self) -> PlainLoops:
        """Return what `plain_loops` does."""
        lists = [self._list_of(loop) for loop in self._loops]
        mentions = [node.attr for node in self._nodes_but_len() if isinstance(node, ast.Attribute)]
        found: dict[str, frozenset[str]] = {}
        for name in filter(None, lists):
            loops = [loop for loop, its in zip(self._loops, lists, strict=True) if its == name]
            needs = [self._needs(loop) for loop in loops]
            if mentions.count(name) == len(loops) and None not in needs:
                found[name] = frozenset().union(*filter(None, needs))
        return found

    def _list_of(self, loop: ast.For) -> str | None:
        """Return the attribute of the model that a loop goes through, by `enumerate` or without."""
        match loop.iter:
            case ast.Attribute(ast.Name(self._model), name):
                return name
            case ast.Call(ast.Name("enumerate"), [ast.Attribute(ast.Name(self._model), name)]):
                return name
        return None

    def _nodes_but_len(self) -> list[ast.AST]:
        """Return all nodes but the arguments of `len`."""
        nodes: list[ast.AST] = [self._function]
        for node in nodes:
            match node:
                case ast.Call(ast.Name("len")):
                    continue
            nodes += ast.iter_child_nodes(node)
        return nodes

    def _needs(self, loop: ast.For) -> frozenset[str] | None:
        """Return the inputs without which `loop` only calls blocks; None: it does more."""
        match loop.target:
            case ast.Name(block):
                index = ""
            case ast.Tuple([ast.Name(index), ast.Name(block)]):
                pass
            case _:
                return None
        if loop.orelse or {index, block} & self._read_outside:
            return None
        needs, rest = set(), []
        for statement in loop.body:
            match statement:
                case ast.If(ast.Compare(ast.Name(x), [ast.IsNot()], [ast.Constant(None)]), _, []):
                    needs.add(x)
                case ast.If(test, yes, no) if _only_asks(test, index):
                    rest += [*yes, *no]
                case _:
                    rest.append(statement)
        is_plain = needs <= self._inputs and all(_only_calls(each, block, index) for each in rest)
        return frozenset(needs) if is_plain else None


def _only_asks(test: ast.expr, index: str) -> bool:
    """Whether a condition is the same on each turn, and does nothing."""
    for node in ast.walk(test):
        match node:
            case ast.Call(ast.Attribute(_, "is_grad_enabled"), []):
                pass
            case ast.Call() | ast.NamedExpr() | ast.Await() | ast.Yield():
                return False
            case ast.Name(name) if name == index:
                return False
    return True


def _only_calls(statement: ast.stmt, block: str, index: str) -> bool:
    """Whether a statement does nothing but give names to what the block returns."""
    match statement:
        case ast.Assign([target], ast.Call(ast.Name(called), [*_])):
            is_block = called == block
        case ast.Assign([target], ast.Call(ast.Attribute(_, called), [ast.Name(first), *_])):
            is_block = (called, first) == (CHECKPOINT, block)
        case _:
            return False
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    nodes = [*ast.walk(statement)]
    acts = sum(isinstance(x, ast.Call | ast.NamedExpr | ast.Await | ast.Yield) for x in nodes)
    names = {x.id for x in nodes if isinstance(x, ast.Name)}
    only_names = all(isinstance(x, ast.Name) for x in targets)
    return is_block and acts == 1 and only_names and index not in names
