"""What a checkpoint says about the model inside it, in plain types, and whether it fits the model at hand."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar

from lightning_modules.backbone import BackboneConfig
from mirrorla import HOSTS, MirrorConfig


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
        head: kind and sizes of a dense task's head; empty for a classifier.
        class_names: by class id (detection: by label - 1), so that pictures without a dataset can be told.
        host: options of a host; empty for other backbones.
    """

    KEY: ClassVar[str] = "mirrorla"

    task: str
    backbone: str
    num_classes: int
    has_ema: bool
    attention: list[str]
    mirror: dict[str, Any]
    head: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    host: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        backbone: BackboneConfig,
        num_classes: int,
        has_ema: bool,
        class_names: list[str],
        head: dict[str, Any] | None = None,
    ) -> "ModelCard":
        """The card of a module at hand; see the attributes."""
        layout, mirror = list(backbone.layout), asdict(backbone.mirror)
        host = asdict(backbone.host) if backbone.name in HOSTS else {}
        return cls(task, backbone.name, num_classes, has_ema, layout, mirror, head or {}, list(class_names), host)

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
        needed = {one.name for one in fields(cls) if one.default_factory is MISSING}
        missing = needed - card.keys()
        if missing:
            raise ValueError(
                f"this checkpoint's model card lacks {', '.join(sorted(missing))}: it is of another version"
            )
        known = {one.name: card[one.name] for one in fields(cls) if one.name in card}
        if isinstance(known["mirror"], dict):  # else require_match tells
            known["mirror"] = asdict(MirrorConfig()) | known["mirror"]  # what came later was off before
        return cls(**known)

    def matched(self, checkpoint: dict[str, Any]) -> "ModelCard":
        """The card inside a checkpoint, if that fits what the configuration builds; see require_match."""
        found = self.from_checkpoint(checkpoint)
        self.require_match(found)
        return found

    def require_match(self, found: "ModelCard") -> None:
        """Refuse weights of another model.

        Args:
            found: the card inside the checkpoint; self is what the configuration builds.

        Raises:
            ValueError: naming the first difference, both values and the mend.
        """
        for name, option in (
            ("task", None),
            ("backbone", "--model.backbone.name"),
            ("num_classes", "--model.num_classes"),
            ("has_ema", "--model.ema_decay"),
            ("attention", "--model.backbone.attention"),
            ("mirror", "--model.backbone.mirror"),
            ("host", "--model.backbone.host"),
            ("head", "--model.detector or --model.head"),
        ):
            inside, wanted = getattr(found, name), getattr(self, name)
            if inside != wanted:
                mend = f"change {option}, or" if option else "use"
                raise ValueError(
                    f"the checkpoint's {name} is {inside!r} but the configuration builds {wanted!r}; "
                    f"{mend} give another --ckpt_path or --run_dir"
                )
