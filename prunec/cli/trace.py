from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from prunec.cli import options

if TYPE_CHECKING:
    import prunec
    from prunec.cli.console import Screen


def trace(
    model: options.Model,
    json: options.Json = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Trace MODEL: what its graph holds.

    Lists nodes, parameters, and what could not be understood. Only the configuration is read, not
    the weights, where that is enough.

    Example: prunec trace smollm2 --json trace.json
    """
    from prunec.cli.console import Screen
    from prunec.cli.opening import open_coupled

    screen = Screen(quiet=quiet, json=json)
    _, coupling = open_coupled(model, screen, trust_remote_code=trust_remote_code)
    result = {"model": model, "front_end": "torch.export", **_summary(coupling)}
    _show(screen, result)
    screen.write_json(result)


def _summary(coupling: prunec.CouplingGraph) -> dict[str, Any]:
    program, layout = coupling.program, coupling.layout
    operators = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    weights = [program.state[name] for name in program.parameters]
    return {
        "inputs": {name: list(value.shape) for name, value in program.example.items()},
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "parameter_tensors": len(weights),
        "parameters": sum(weight.numel() for weight in weights),
        "tied": dict(program.tied),
        "missing_rules": dict(layout.missing),
        "problems": dict(layout.problems),
    }


def _show(screen: Screen, result: dict[str, Any]) -> None:
    inputs = ", ".join(f"{name} {shape}" for name, shape in result["inputs"].items())
    rows = [
        ["front end", result["front_end"]],
        ["inputs", inputs],
        ["nodes", f"{result['nodes']} calls of {len(result['operators'])} operators"],
        ["parameters", f"{result['parameters']:,} in {result['parameter_tensors']} tensors"],
    ]
    rows += [["tied", f"{other} = {name}"] for other, name in result["tied"].items()]
    screen.facts(result["model"], rows)
    unclear = [[op, f"no dim rule, {count} calls"] for op, count in result["missing_rules"].items()]
    unclear += [[node, problem] for node, problem in result["problems"].items()]
    if unclear:
        screen.facts("Not understood, so what it touches is pinned", unclear)
    else:
        screen.say("Every operator was understood.")
