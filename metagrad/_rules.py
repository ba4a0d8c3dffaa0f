"""The formulas of SGD and Adam for one entry, and their pullbacks; x̄ is the cotangent of x."""

from dataclasses import dataclass

from torch import Tensor

from metagrad._block import Block, Entries, Pulled, Values, Wanted


@dataclass(frozen=True)
class SgdRule:
    """g ← g + decay·θ;  v ← kept·v + share·g;  u = −lr·(v, or g + kept·v with Nesterov's look ahead, or g alone)."""

    nesterov: bool
    decays: bool

    def at(self, now: Values, count: int) -> Values:
        # A Python number, not torch.where: a where of two Python numbers is float32 whatever the parameters are.
        return {**now, "share": 1.0 if count == 0 else 1.0 - now["dampening"], "later": float(count > 0)}

    def update(self, now: Values, block: Block) -> tuple[Entries, list[Entries]]:
        gradient = block.gradient + now["weight_decay"] * block.params if self.decays else block.gradient
        if not block.memory:
            return -now["lr"] * gradient, []
        velocity = now["momentum"] * block.memory[0] + now["share"] * gradient
        direction = gradient + now["momentum"] * velocity if self.nesterov else velocity
        return -now["lr"] * direction, [velocity]

    def pull(self, now: Values, block: Block, update: Entries, memory: list[Entries], wanted: Wanted) -> Pulled:
        gradient = block.gradient + now["weight_decay"] * block.params if self.decays else block.gradient
        direction = gradient
        to_gradient = to_direction = -now["lr"] * update
        back: list[Entries] = []
        values: dict[str, Tensor] = {}
        if block.memory:
            kept, share, before = now["momentum"], now["share"], block.memory[0]
            velocity = kept * before + share * gradient
            direction = gradient + kept * velocity if self.nesterov else velocity
            to_velocity = kept * to_direction if self.nesterov else to_direction
            to_velocity = memory[0] + to_velocity if memory else to_velocity
            to_gradient = share * to_velocity + (to_direction if self.nesterov else 0.0)
            back = [kept * to_velocity] if wanted.state else []
            if wanted.values:
                ahead = _dot(to_direction, velocity) if self.nesterov else 0.0
                values["momentum"] = _dot(to_velocity, before) + ahead
                values["dampening"] = -now["later"] * _dot(to_velocity, gradient)
        if wanted.values:
            values |= {"lr": -_dot(update, direction), "weight_decay": _dot(to_gradient, block.params)}
        to_params = now["weight_decay"] * to_gradient if self.decays and wanted.state else None
        return Pulled(to_gradient, to_params, back, values)


@dataclass(frozen=True)
class AdamRule:
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  u = −lr·(m/c₁)/(√(v/c₂ + eps_root) + eps), cₖ = 1 − βₖᵗ.

    The decay is added to u (`decoupled`) or to g.
    """

    decoupled: bool
    decays: bool

    def at(self, now: Values, count: int) -> Values:
        step, beta1, beta2 = count + 1, now["betas[0]"], now["betas[1]"]
        # How the corrections c change with their β.
        slopes = {"slope1": step * beta1**count, "slope2": step * beta2**count}
        return {**now, "scale1": 1 - beta1**step, "scale2": 1 - beta2**step, **slopes}

    def update(self, now: Values, block: Block) -> tuple[Entries, list[Entries]]:
        gradient = self._decayed(now, block.gradient, block, not self.decoupled)
        beta1, beta2 = now["betas[0]"], now["betas[1]"]
        mean = beta1 * block.memory[0] + (1 - beta1) * gradient
        square = beta2 * block.memory[1] + (1 - beta2) * gradient * gradient
        root = (square / now["scale2"] + now["eps_root"]).sqrt()
        direction = (mean / now["scale1"]) / (root + now["eps"])
        return -now["lr"] * self._decayed(now, direction, block, self.decoupled), [mean, square]

    def pull(self, now: Values, block: Block, update: Entries, memory: list[Entries], wanted: Wanted) -> Pulled:
        gradient = self._decayed(now, block.gradient, block, not self.decoupled)
        beta1, beta2, scale1, scale2 = now["betas[0]"], now["betas[1]"], now["scale1"], now["scale2"]
        mean = beta1 * block.memory[0] + (1 - beta1) * gradient
        square = beta2 * block.memory[1] + (1 - beta2) * gradient * gradient
        root = (square / scale2 + now["eps_root"]).sqrt()
        divisor = root + now["eps"]
        direction = mean / divisor / scale1

        to_direction = -now["lr"] * update
        divided = to_direction / divisor
        to_mean = divided / scale1
        to_divisor = -divided * direction
        to_inside = to_divisor / root / 2
        to_square = to_inside / scale2
        if memory:
            to_mean, to_square = memory[0] + to_mean, memory[1] + to_square
        to_gradient = (1 - beta1) * to_mean + (2 * (1 - beta2)) * gradient * to_square

        decayed = to_direction if self.decoupled else to_gradient
        values: dict[str, Tensor] = {}
        if wanted.values:
            values = {
                "lr": -_dot(update, self._decayed(now, direction, block, self.decoupled)),
                "betas[0]": _dot(to_mean, block.memory[0] - gradient)
                + _dot(to_direction, direction) / scale1 * now["slope1"],
                "betas[1]": _dot(to_square, block.memory[1] - gradient * gradient)
                + _dot(to_inside, square) / scale2**2 * now["slope2"],
                "eps": to_divisor.sum(),
                "eps_root": to_inside.sum(),
                "weight_decay": _dot(decayed, block.params),
            }
        if not wanted.state:
            return Pulled(to_gradient, None, [], values)
        to_params = now["weight_decay"] * decayed if self.decays else None
        return Pulled(to_gradient, to_params, [beta1 * to_mean, beta2 * to_square], values)

    def _decayed(self, now: Values, entries: Entries, block: Block, here: bool) -> Entries:
        return entries + now["weight_decay"] * block.params if self.decays and here else entries


def _dot(left: Entries, right: Entries) -> Tensor:
    return (left * right).sum()
