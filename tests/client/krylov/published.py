"""Published test problems for minimisation, with their starts and minima.

Source: Moré, Garbow, Hillstrom 1981 (https://doi.org/10.1145/355934.355936), where a
name of CUTEst does not say another.
"""

import jax.numpy as jnp
import numpy as np

u = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
rates = np.array([0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
bard = np.array([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39])
bell = np.array([0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989])
bell = np.r_[bell, bell[:-1][::-1]]


def sum2(r):
    return jnp.sum(jnp.asarray(r) ** 2)


def rosenbr(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def freuroth(x):
    a = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    return a**2 + (-29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]) ** 2


def brownbs(x):
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def beale(x):
    return sum2([y - x[0] * (1 - x[1] ** i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))])


def jensmp(x):
    i = np.arange(1, 11)
    return sum2(2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1])))


def helix(x):
    angle = jnp.arctan(x[1] / x[0]) / (2 * np.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    return 100 * (x[2] - 10 * angle) ** 2 + 100 * (jnp.hypot(x[0], x[1]) - 1) ** 2 + x[2] ** 2


def bard_(x):
    i = np.arange(1, 16)
    return sum2(bard - (x[0] + i / ((16 - i) * x[1] + np.minimum(i, 16 - i) * x[2])))


def gaussian(x):
    t = (8 - np.arange(1, 16)) / 2
    return sum2(x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - bell)


def box3(x):
    t = 0.1 * np.arange(1, 11)
    return sum2(jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t)))


def powellsg(x):
    a, b, c, d = x.reshape(-1, 4).T
    return jnp.sum((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4)


def woods(x):
    a, b, c, d = x.reshape(-1, 4).T
    valleys = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return jnp.sum(valleys + 10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10)


def kowosb(x):
    return sum2(rates - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3]))


def brownden(x):
    t = np.arange(1, 21) / 5
    return sum2((x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2)


def biggs6(x):
    t = 0.1 * np.arange(1, 14)
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return sum2(x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y)


def watson(x):
    t = np.arange(1, 30)[:, None] / 29
    j = np.arange(len(x))
    powers = t**j
    slopes = j[1:] * t ** (j[1:] - 1)
    return sum2(slopes @ x[1:] - (powers @ x) ** 2 - 1) + x[0] ** 2 + (x[1] - x[0] ** 2 - 1) ** 2


def penalty1(x):
    return 1e-5 * sum2(x - 1) + (sum2(x) - 0.25) ** 2


def vardim(x):
    s = jnp.sum(np.arange(1, len(x) + 1) * (x - 1))
    return sum2(x - 1) + s**2 + s**4


def trigger(x):
    n = len(x)
    i = np.arange(1, n + 1)
    return sum2(n - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x))


def broydn3d(x):
    y = jnp.pad(x, 1)
    return sum2((3 - 2 * x) * x - y[:-2] - 2 * y[2:] + 1)


def extrosnb(x):
    return jnp.sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2)


def arwhead(x):  # Conn, Gould, Lescrenier, Toint 1992
    return jnp.sum((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3)


def engval1(x):
    return jnp.sum((x[:-1] ** 2 + x[1:] ** 2) ** 2) + jnp.sum(-4 * x[:-1] + 3)


def cliff(x):
    return ((x[0] - 3) / 100) ** 2 - (x[0] - x[1]) + jnp.exp(20 * (x[0] - x[1]))


def sisser(x):
    return 3 * x[0] ** 4 - 2 * x[0] ** 2 * x[1] ** 2 + 3 * x[1] ** 4


PROBLEMS = {
    "ROSENBR": (rosenbr, [-1.2, 1.0], [0.0]),
    "FREUROTH": (freuroth, [0.5, -2.0], [0.0, 48.9842536792]),
    "BROWNBS": (brownbs, [1.0, 1.0], [0.0]),
    "BEALE": (beale, [1.0, 1.0], [0.0]),
    "JENSMP": (jensmp, [0.3, 0.4], [124.362182355]),
    "HELIX": (helix, [-1.0, 0.0, 0.0], [0.0]),
    "BARD": (bard_, [1.0, 1.0, 1.0], [8.2148773065e-3]),
    "GAUSSIAN": (gaussian, [0.4, 1.0, 0.0], [1.12793276961e-8]),
    "BOX3": (box3, [0.0, 10.0, 20.0], [0.0]),
    "POWELLSG": (powellsg, [3.0, -1.0, 0.0, 1.0] * 5, [0.0]),
    "WOODS": (woods, [-3.0, -1.0, -3.0, -1.0] * 5, [0.0]),
    "KOWOSB": (kowosb, [0.25, 0.39, 0.415, 0.39], [3.07505603849e-4]),
    "BROWNDEN": (brownden, [25.0, 5.0, -5.0, -1.0], [85822.2016263563]),
    "BIGGS6": (biggs6, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], [0.0, 5.65564991e-3]),
    "WATSON": (watson, [0.0] * 6, [2.28767005355e-3]),
    "PENALTY1": (penalty1, list(np.arange(1.0, 11.0)), [7.08765146709e-5]),
    "VARDIM": (vardim, list(1 - np.arange(1, 11) / 10), [0.0]),
    "TRIGGER": (trigger, [0.1] * 10, [0.0, 2.79506e-5]),
    "BROYDN3D": (broydn3d, [-1.0] * 40, [0.0]),
    "EXTROSNB": (extrosnb, [-1.2, 1.0] * 20, [0.0]),
    "ARWHEAD": (arwhead, [1.0] * 100, [0.0]),
    "CLIFF": (cliff, [0.0, -1.0], [0.199786613678]),
    "SISSER": (sisser, [1.0, 0.1], [0.0]),
    "ENGVAL1": (engval1, [2.0] * 2, [0.0]),
}
