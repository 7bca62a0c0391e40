"""Vectors of eight floats inside numba kernels, where a compiler left to itself does not keep sums in registers.

Each function becomes a few instructions on `<8 x float>` of LLVM, which suits them to the machine (AVX2: one
register; NEON: two). Offsets count floats in the memory of a contiguous float32 array; nothing checks bounds.
For use in `jit.kernel` functions only.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportAttributeAccessIssue=false, reportUnknownLambdaType=false
from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 8
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)
_ANY = ("contract", "reassoc", "nsz", "arcp")


class Float8(types.Type):
    """The numba type of a vector."""


float8 = Float8("Float8")
register_model(Float8)(lambda manager, type_: models.PrimitiveModel(manager, type_, _VECTOR))


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(_UNDEFINED, value, _INT(0))
    return builder.shuffle_vector(one, _UNDEFINED, ir.Constant(_INTS, [0] * LANES))


def _constant(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def load(typing: Any, array: Any, offset: Any):
    """The eight floats at `offset`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any):
        address = _address(context, builder, signature, args)
        return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)

    return float8(array, types.intp), generate


@intrinsic
def spread(typing: Any, array: Any, offset: Any):
    """The float at `offset`, eight times."""

    def generate(context: Any, builder: Any, signature: Any, args: Any):
        return _splat(builder, builder.load(_address(context, builder, signature, args)))

    return float8(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any):
    """Write eight floats at `offset`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any):
        address = _address(context, builder, signature, args)
        builder.store(args[2], builder.bitcast(address, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, float8), generate


def _operation(build: Callable[..., Any], doc: str, takes: Any = float8, gives: Any = float8) -> Any:
    """An intrinsic whose arguments are all of one type; `build(builder, a, ...)` makes its instructions."""

    def typed(typing: Any, *args: Any):
        return gives(*[takes] * len(args)), lambda context, builder, signature, values: build(builder, *values)

    typed.__doc__, typed.__signature__ = doc, inspect.signature(build)
    return intrinsic(typed)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_ANY), c, flags=_ANY)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _exp(builder: Any, x: Any) -> Any:
    """2^y for y in [-1/2, 1/2] is a polynomial (Cephes' exp2f); the whole part goes into the exponent's bits."""
    y, lowest = builder.fmul(x, _constant(1.4426950408889634)), _constant(-126.0)
    bounded = _larger(builder, y, lowest)  # a number even where y is NaN: it becomes an integer
    y = builder.select(builder.fcmp_ordered("<", y, lowest), lowest, y)  # still NaN where y is
    kind = ir.FunctionType(_VECTOR, [_VECTOR])
    floor = cgutils.get_or_insert_function(builder.module, kind, "llvm.floor.v8f32")
    whole = builder.call(floor, [builder.fadd(bounded, _constant(0.5))])
    y = builder.fsub(y, whole)
    p = _constant(1.535336188319500e-4)
    terms = (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1)
    for c in (*terms, 6.931472028550421e-1, 1.0):
        p = _fma(builder, p, y, _constant(c))
    exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * LANES))
    bits = builder.shl(exponent, ir.Constant(_INTS, [23] * LANES))
    return builder.fmul(p, builder.bitcast(bits, _VECTOR))


def _reduce(combine: Callable[..., Any], builder: Any, a: Any) -> Any:
    result = builder.extract_element(a, _INT(0))
    for lane in range(1, LANES):
        result = combine(builder, result, builder.extract_element(a, _INT(lane)))
    return result


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=_ANY)


splat = _operation(_splat, "One float, eight times.", takes=types.float32)
add = _operation(_add, "a + b.")
mul = _operation(lambda builder, a, b: builder.fmul(a, b, flags=_ANY), "a * b.")
div = _operation(lambda builder, a, b: builder.fdiv(a, b), "a / b.")
fma = _operation(_fma, "a * b + c, in one instruction where the machine has it.")
larger = _operation(_larger, "The larger of each pair; b where one is NaN.")
smaller = _operation(_smaller, "The smaller of each pair; b where one is NaN.")
exp = _operation(_exp, "exp(x) for x < 88, down to 2^-126; relative error below 3e-7 + |x| / 2^23.")
sum_of = _operation(partial(_reduce, _add), "The sum of the eight.", gives=types.float32)
largest_of = _operation(partial(_reduce, _larger), "The largest of the eight.", gives=types.float32)
