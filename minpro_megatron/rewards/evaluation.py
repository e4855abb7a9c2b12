"""The value of a sympy expression at a point: exact if it is rational, otherwise with a given number of digits.

An expression is compiled once into a list of steps, with each distinct subexpression once, so that an evaluation takes
time linear in the expression's size, whatever its nesting.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import sympy
from mpmath import MPContext

MAX_EXACT_BITS = 100_000  # of a rational result; larger ones become floating-point numbers
MAX_EXPONENT_BITS = 1e8  # of a floating-point result: reducing larger arguments of exp takes too long
MAX_ANGLE_BITS = 2000  # the same for sin and cos
MAX_EXACT_FACTORIAL = 2000
# For the gamma function: at 3,000 digits one value takes minutes. Digits beyond this number are no longer correct, so
# two values that agree in more digits are considered different.
MAX_GAMMA_DIGITS = 200

Value = Any  # Fraction, mpf or mpc
Step = tuple[Callable[..., Value], tuple[int, ...]]


class UndefinedError(ArithmeticError):
    """The expression has no value at this point (no real one if that is required), or one too large to compute."""


class UnknownFunctionError(ValueError):
    """The expression contains something that this module does not evaluate."""


_MP_FUNCTIONS = {
    sympy.sin: "sin", sympy.cos: "cos", sympy.tan: "tan", sympy.cot: "cot", sympy.sec: "sec", sympy.csc: "csc",
    sympy.asin: "asin", sympy.acos: "acos", sympy.atan: "atan", sympy.acot: "acot", sympy.asec: "asec",
    sympy.acsc: "acsc", sympy.sinh: "sinh", sympy.cosh: "cosh", sympy.tanh: "tanh", sympy.coth: "coth",
    sympy.sech: "sech", sympy.csch: "csch", sympy.asinh: "asinh", sympy.acosh: "acosh", sympy.atanh: "atanh",
}  # fmt: skip
_METHODS = {
    sympy.Add: "_add", sympy.Mul: "_multiply", sympy.Pow: "_power", sympy.exp: "_exp", sympy.log: "_log",
    sympy.floor: "_floor", sympy.ceiling: "_ceiling", sympy.Mod: "_modulo", sympy.Abs: "_absolute",
    sympy.sign: "_sign", sympy.Max: "_largest", sympy.Min: "_smallest", sympy.factorial: "_factorial",
    sympy.gamma: "_gamma", sympy.binomial: "_binomial", sympy.UnevaluatedExpr: "_same",
}  # fmt: skip
_CONSTANTS = {sympy.pi: "pi", sympy.E: "e", sympy.EulerGamma: "euler", sympy.GoldenRatio: "phi"}
# Evaluated by sympy itself, with unbounded cost: at few points only.
SLOW = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)


class Program:
    """An expression that can be evaluated at many points. Raises UnknownFunctionError, RecursionError."""

    def __init__(self, expression: sympy.Expr, digits: int) -> None:
        self._mp = MPContext()
        self._mp.dps = digits
        self._digits = digits
        self._positions: dict[Any, int] = {}
        self._steps: list[Step] = []
        self._at: Mapping[Any, Fraction] = {}
        self._is_real = True
        self.is_slow = expression.has(*SLOW)
        self._compile(expression)

    def value(self, at: Mapping[Any, Fraction], is_real: bool) -> Value:
        """The value with the symbols at `at`. `is_real`: no root, logarithm or arc of a real number may be complex.

        Raises UndefinedError.
        """
        self._at, self._is_real = at, is_real
        values: list[Value] = []
        try:
            for function, arguments in self._steps:
                values.append(function(*(values[position] for position in arguments)))
        except UndefinedError:
            raise
        except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
            raise UndefinedError(str(error)) from error
        result = values[-1]
        if not isinstance(result, Fraction) and not self._mp.isfinite(result):
            raise UndefinedError("no finite value")
        return result

    def number(self, value: Value) -> Any:
        """The value as a floating-point number."""
        return self._mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def _compile(self, node: Any) -> int:
        position = self._positions.get(node)
        if position is None:
            step = self._step(node)
            position = self._positions[node] = len(self._steps)
            self._steps.append(step)
        return position

    def _step(self, node: Any) -> Step:
        constant = self._constant(node)
        if constant is not None:
            return (lambda: constant), ()
        if isinstance(node, sympy.Symbol):
            return (lambda: self._at[node]), ()
        if isinstance(node, SLOW):
            return (lambda: self._by_sympy(node)), ()
        kind = type(node)
        if kind in _MP_FUNCTIONS:
            name = _MP_FUNCTIONS[kind]
            return self._applied(lambda argument: self._elementary(name, argument), node.args)
        if kind in _METHODS:
            return self._applied(getattr(self, _METHODS[kind]), node.args)
        if isinstance(node, sympy.core.function.AppliedUndef):
            name = str(node.func)
            return self._applied(lambda *arguments: self._opaque(name, *arguments), node.args)
        raise UnknownFunctionError(kind.__name__)

    def _applied(self, function: Callable[..., Value], arguments: tuple[Any, ...]) -> Step:
        return function, tuple(self._compile(argument) for argument in arguments)

    def _constant(self, node: Any) -> Value | None:
        if isinstance(node, sympy.Rational):
            return Fraction(int(node.p), int(node.q))
        if isinstance(node, sympy.Float):
            return Fraction(str(node))
        if node == sympy.I:
            return self._mp.mpc(0, 1)
        name = _CONSTANTS.get(node)
        return +getattr(self._mp, name) if name else None

    def _add(self, *terms: Value) -> Value:
        exact = sum((term for term in terms if isinstance(term, Fraction)), Fraction(0))
        others = [term for term in terms if not isinstance(term, Fraction)]
        return sum(others, self.number(exact)) if others else exact

    def _multiply(self, *factors: Value) -> Value:
        exact = math.prod((factor for factor in factors if isinstance(factor, Fraction)), start=Fraction(1))
        others = [factor for factor in factors if not isinstance(factor, Fraction)]
        if exact.numerator.bit_length() + exact.denominator.bit_length() > MAX_EXACT_BITS:
            return math.prod(others, start=self.number(exact))
        return math.prod(others, start=self.number(exact)) if others else exact

    def _power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return self._integer_power(base, exponent.numerator)
        if isinstance(base, self._mp.mpc) or isinstance(exponent, self._mp.mpc):
            return self._bounded_power(base, exponent)
        if base == 0:
            if exponent > 0:
                return Fraction(0)
            raise UndefinedError("a power of zero")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator in (2, 3):
            root = _exact_root(abs(base), exponent.denominator)
            if root is not None and (base > 0 or (exponent.denominator == 3 and self._is_real)):
                return self._integer_power(root if base > 0 else -root, exponent.numerator)
        if base < 0 and self._is_real:
            if not isinstance(exponent, Fraction) or exponent.denominator % 2 == 0:
                raise UndefinedError("an even root of a negative number")
            sign = -1 if exponent.numerator % 2 else 1  # the real root
            return sign * self._bounded_power(-base, exponent)
        return self._bounded_power(base, exponent)

    def _integer_power(self, base: Value, exponent: int) -> Value:
        if base == 0 and exponent < 0:
            raise UndefinedError("division by zero")
        if isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent) <= MAX_EXACT_BITS or abs(base) in (0, 1):
                return base**exponent if abs(base) != 1 else base ** (exponent % 2)
        return self._bounded_power(base, Fraction(exponent))

    def _bounded_power(self, base: Value, exponent: Value) -> Value:
        base, exponent = self.number(base), self.number(exponent)
        if abs(exponent) * (abs(self._mp.mag(base)) + 1) > MAX_EXPONENT_BITS:
            raise UndefinedError("too large")
        return self._mp.power(base, exponent)

    def _exp(self, exponent: Value) -> Value:
        if exponent == 0:
            return Fraction(1)
        return self._bounded_power(+self._mp.e, exponent)

    def _log(self, argument: Value, base: Value = None) -> Value:
        if argument == 0 or base == 1:
            raise UndefinedError("a logarithm")
        result = self._checked_real(self._mp.log(self.number(argument)), argument)
        if base is None:
            return result
        return result / self._checked_real(self._mp.log(self.number(base)), base)

    def _elementary(self, name: str, argument: Value) -> Value:
        argument = self.number(argument)
        if self._mp.mag(argument) > MAX_ANGLE_BITS:
            raise UndefinedError("too large")
        return self._checked_real(getattr(self._mp, name)(argument), argument)

    def _checked_real(self, result: Value, argument: Value) -> Value:
        if self._is_real and isinstance(result, self._mp.mpc) and not isinstance(argument, self._mp.mpc):
            raise UndefinedError("not real")
        return result

    def _real(self, value: Value) -> Value:
        if isinstance(value, self._mp.mpc):
            raise UndefinedError("not real")
        return value

    def _floor(self, value: Value) -> Value:
        value = self._real(value)
        if isinstance(value, Fraction):
            return Fraction(math.floor(value))
        if self._mp.mag(value) > self._mp.prec / 2:
            raise UndefinedError("too large to have an integer part")
        nearest = self._mp.nint(value)
        if abs(value - nearest) < self._mp.mpf(2) ** (-self._mp.prec / 4):  # \log_2 8
            return Fraction(int(nearest))
        return Fraction(int(self._mp.floor(value)))

    def _ceiling(self, value: Value) -> Value:
        return -self._floor(-value)

    def _modulo(self, value: Value, modulus: Value) -> Value:
        quotient = self._multiply(value, self._integer_power(modulus, -1))
        return self._add(value, self._multiply(Fraction(-1), modulus, self._floor(quotient)))

    def _absolute(self, value: Value) -> Value:
        return abs(value)

    def _sign(self, value: Value) -> Value:
        value = self._real(value)
        return Fraction((value > 0) - (value < 0))

    def _largest(self, *values: Value) -> Value:
        return max((self._real(value) for value in values), key=self.number)

    def _smallest(self, *values: Value) -> Value:
        return min((self._real(value) for value in values), key=self.number)

    def _factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1 and value <= MAX_EXACT_FACTORIAL:
            if value < 0:
                raise UndefinedError("the factorial of a negative number")
            return Fraction(math.factorial(value.numerator))
        return self._gamma(self._add(value, Fraction(1)))

    def _gamma(self, value: Value) -> Value:
        value = self.number(value)
        if self._mp.mag(value) > 40:
            raise UndefinedError("too large")
        with self._mp.workdps(min(self._digits, MAX_GAMMA_DIGITS)):
            return self._mp.gamma(value)

    def _binomial(self, upper: Value, lower: Value) -> Value:
        exact = all(isinstance(value, Fraction) and value.denominator == 1 for value in (upper, lower))
        if exact and 0 <= upper <= MAX_EXACT_FACTORIAL:
            return Fraction(math.comb(upper.numerator, lower.numerator) if lower >= 0 else 0)
        if max(self._mp.mag(self.number(value)) for value in (upper, lower)) > 40:
            raise UndefinedError("too large")
        upper, lower = self.number(upper), self.number(lower)
        with self._mp.workdps(min(self._digits, MAX_GAMMA_DIGITS)):
            return self._mp.binomial(upper, lower)

    def _same(self, value: Value) -> Value:
        return value

    def _opaque(self, name: str, *arguments: Value) -> Value:
        """A function without a known value, such as f(x): the same for the same name, smooth, without identities."""
        seed = zlib.crc32(f"{name}/{len(arguments)}".encode())
        total = self._mp.mpf(1 + seed % 89) / 97
        for index, argument in enumerate(arguments, 1):
            argument = self.number(argument)
            if self._mp.mag(argument) > MAX_ANGLE_BITS:
                raise UndefinedError("too large")
            total += self._mp.cos(argument * (1 + seed // (7 * index) % 101) / 103 + index)
        return total

    def _by_sympy(self, node: Any) -> Value:
        at = {symbol: sympy.Rational(value.numerator, value.denominator) for symbol, value in self._at.items()}
        value = node.evalf(self._digits, subs=at)
        real, imaginary = value.as_real_imag()
        if not (isinstance(real, sympy.Number) and isinstance(imaginary, sympy.Number) and real.is_finite):
            raise UndefinedError("not evaluated")
        real_part = self._mp.mpf(str(real.evalf(self._digits)))
        return self._mp.mpc(real_part, self._mp.mpf(str(imaginary.evalf(self._digits)))) if imaginary else real_part


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The square or cube root of a non-negative rational number, if it is rational."""
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_EXACT_BITS:
        return None
    numerator, exact = sympy.integer_nthroot(value.numerator, degree)
    if not exact:
        return None
    denominator, exact = sympy.integer_nthroot(value.denominator, degree)
    return Fraction(int(numerator), int(denominator)) if exact else None
