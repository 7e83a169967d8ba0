"""What a checkpoint says about the model inside it, in plain types, and whether it fits the model at hand."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class ModelCard:
    """The identity of a trained model.

    Attributes:
        task: "classification" and its siblings.
        backbone: variant name.
        num_classes: C.
        has_ema: whether averaged weights are inside.
        attention: kind of attention in each stage.
        mirror: options of the mirrors.
    """

    KEY: ClassVar[str] = "mirrorla"

    task: str
    backbone: str
    num_classes: int
    has_ema: bool
    attention: list[str]
    mirror: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: checkpoints load with weights_only=True."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "ModelCard":
        """Read the card of a loaded checkpoint.

        Raises:
            ValueError: when the checkpoint was not written by this project, or by another version of it.
        """
        card = checkpoint.get(cls.KEY)
        if card is None:
            raise ValueError(
                "this checkpoint holds no mirrorla model card, so it was not written by `mirrorla fit`; "
                "to start from foreign weights use --model.backbone.pretrained FILE"
            )
        missing = {field.name for field in fields(cls)} - card.keys()
        if missing:
            raise ValueError(
                f"this checkpoint's model card lacks {', '.join(sorted(missing))}: it is of another version"
            )
        return cls(**{field.name: card[field.name] for field in fields(cls)})

    def require_match(self, found: "ModelCard") -> None:
        """Refuse weights of another model.

        Args:
            found: the card inside the checkpoint; self is what the configuration builds.

        Raises:
            ValueError: naming the first difference, both values and the mend.
        """
        for field, option in (
            ("task", None),
            ("backbone", "--model.backbone.name"),
            ("num_classes", "--model.num_classes"),
            ("has_ema", "--model.ema_decay"),
            ("attention", "--model.backbone.attention"),
            ("mirror", "--model.backbone.mirror"),
        ):
            inside, wanted = getattr(found, field), getattr(self, field)
            if inside != wanted:
                mend = f"change {option}, or" if option else "use"
                raise ValueError(
                    f"the checkpoint's {field} is {inside!r} but the configuration builds {wanted!r}; "
                    f"{mend} give another --ckpt_path or --run_dir"
                )
