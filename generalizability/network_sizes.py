"""Parameters and multiply-adds of every network in the tables, as built here and in the published order of operations.

    python generalizability/network_sizes.py --out generalizability/results

A transition averages 2x2 pixels and applies a 1x1 convolution. Both orders compute the same function. The published
code convolves first, which takes 4 times the multiply-adds. Writes network_sizes.json and prints a table. Takes
seconds: no weight is allocated.
"""

from dataclasses import dataclass, field
from pathlib import Path

from s3net_common.command_line import answer_flags, run_script
from s3net_common.output_files import claim_folder, default_out, relative, run_record, write_json

# Networks for CIFAR-100, 32x32 pixels and 100 classes: name and options.
CIFAR = [("s3net_cifar", {"growth_rate": k, "depth": depth}) for k, depth in ((12, 40), (24, 40), (40, 40))]
CIFAR += [("s3net_cifar", {"growth_rate": 64, "depth": depth}) for depth in (40, 70)]
CIFAR += [("s3net_cifar", {"growth_rate": k, "depth": 40, "connections": "dense"}) for k in (5, 12)]
CIFAR += [("s3net_cifar", {"growth_rate": k, "depth": 40, "connections": "chain"}) for k in (12, 29)]
CIFAR += [("resnet20_cifar", {}), *(("densenet_cifar", {"growth_rate": 12, "depth": depth}) for depth in (22, 40))]
# Networks for images of 224x224 pixels, 1000 classes.


@dataclass
class Args:
    """Count parameters and multiply-adds of every network, for one image."""

    out: Path = field(default_factory=lambda: default_out("network_sizes"))
    """Folder for network_sizes.json. The file of an earlier run is replaced."""
    overwrite: bool = False
    """Replace a file in --out that this script did not write."""


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch
from torch import Tensor, nn

from s3net_networks import create_network
from s3net_networks.own_models import models
from s3net_networks.size import model_size

LARGE = [name for name in models.list_models() if name != "s3net_cifar"]
LARGE += ["mobilenet_v2", "efficientnet_b0", "octresnet50", "lambda_resnet50", "se_resnet50", "scalenet50"]
LARGE += ["ghostnet", "randwire_ws"]


def main(args: Args) -> None:
    """Count, print and write."""
    claim_folder(args.out, "network_sizes.json", overwrite=args.overwrite)
    rows = [size_row(name, 100, options, 32) for name, options in CIFAR]
    rows += [size_row(name, 1000, {}, 224) for name in LARGE]
    print(f"{'network':46}{'parameters':>12}{'transitions':>13}{'multiply-adds':>15}{'published order':>17}")
    for row in rows:
        label = " ".join([row["network"], *(f"{key}={value}" for key, value in row["options"].items())])
        share = f"{100 * row['transition_share']:.0f}%" if row["transition_share"] else ""
        print(
            f"{label:46}{row['parameters']:12,}{share:>13}{row['multiply_adds'] / 1e6:14,.1f}M"
            f"{row['multiply_adds_published_order'] / 1e6:16,.1f}M"
        )
    write_json(args.out / "network_sizes.json", run_record() | {"rows": rows})
    print(f"written to {relative(args.out / 'network_sizes.json')}")


def size_row(name: str, num_classes: int, options: dict, image_size: int) -> dict:
    """Return the size of a network.

    Returns:
        The arguments; `parameters`; `multiply_adds` for one image; `multiply_adds_published_order`, with the pools of
        the transitions after their convolutions; `transition_share`, the fraction of the parameters in transitions.
    """
    device = torch.device("meta")
    with device:
        model = create_network(name, num_classes, **options)
    transitions = [m for m in model.modules() if isinstance(m, models.NormReluConv) and m.pool > 1]
    extra = 0

    def count(unit: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal extra
        multiply_adds = unit.conv.weight.numel() * output.shape[2] * output.shape[3]
        extra += (unit.pool**2 - 1) * multiply_adds

    hooks = [unit.register_forward_hook(count) for unit in transitions]
    size = model_size(model, image_size, device)
    for hook in hooks:
        hook.remove()
    in_transitions = sum(p.numel() for unit in transitions for p in unit.parameters())
    return {
        "network": name,
        "num_classes": num_classes,
        "options": options,
        "image_size": image_size,
        **size,
        "multiply_adds_published_order": size["multiply_adds"] + extra,
        "transition_share": in_transitions / size["parameters"],
    }


if __name__ == "__main__":
    run_script(main, Args, __doc__)
