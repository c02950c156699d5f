"""Every key of model_config_kd.yaml: its type, default, range and meaning with its unit."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from distillery.config.types import Mean, ModelSource, Number, OutIndices, PathText, PositiveInt, Std, StrictModel, Text


class ProjectorConfig(StrictModel):
    """The head that takes the student's features to the teacher's width; it is not part of the exported student."""

    type: Literal["linear", "mlp"] = Field("mlp", description="mlp: Linear, LayerNorm, GELU, Linear; or linear")
    hidden_dim: PositiveInt | None = Field(
        None, description="width of the mlp's hidden layer; null: 2x the teacher's width"
    )


class ModelConfig(StrictModel):
    """model_config_kd.yaml: teacher, student, projection; widths and patch grids are read from the models."""

    teacher_name: Text = Field("vit_base_patch14_dinov2.lvd142m", description="model name in teacher_source")
    teacher_source: ModelSource = Field("timm", description="timm, torchvision or torch_hub")
    teacher_repo: PathText | None = Field(
        None,
        description="torch_hub only: hub repository, or folder with hubconf.py. Example: facebookresearch/dinov2",
    )
    teacher_pretrained: bool = Field(True, description="load the published weights")
    teacher_checkpoint: PathText | None = Field(
        None,
        description="weights file or exported folder in place of the published ones. "
        "FILE#NAME: one of several models in it",
    )
    teacher_img_size: PositiveInt | None = Field(
        None, description="px; null: image_size rounded to the teacher's patch. Its position embedding is resampled"
    )
    teacher_mean: Mean | None = Field(None, description="of pixels in 0..1; null: the model's own, else data_config's")
    teacher_std: Std | None = Field(None, description="of pixels in 0..1; null: the model's own, else data_config's")
    teacher_kwargs: dict[str, JsonValue] = Field({}, description="arguments of the model's constructor")
    teacher_projection: bool = Field(
        False,
        description="true: the image feature after the projection into text space. "
        "Of timm's image-text models that have one: CLIP, MobileCLIP and others",
    )
    teacher_mirror: bool = Field(
        False,
        description="true: mean of the teacher over image and mirror image. Better targets for twice its time; "
        "stored outputs of views that differ by the mirror alone take no longer than without",
    )
    teacher_freeze: bool = Field(True, description="always true: the teacher never learns")

    student_name: Text = Field("vit_small_patch16_224", description="model name in student_source")
    student_source: ModelSource = Field("timm", description="timm, torchvision or torch_hub")
    student_repo: PathText | None = Field(
        None,
        description="torch_hub only: hub repository, or folder with hubconf.py. Example: facebookresearch/dinov2",
    )
    student_pretrained: bool = Field(False, description="start from the published weights")
    student_checkpoint: PathText | None = Field(
        None, description="weights file or exported folder to start from. FILE#NAME: one of several models in it"
    )
    student_img_size: PositiveInt | None = Field(
        None, description="px; null: image_size rounded to the student's patch"
    )
    student_mean: Mean | None = Field(None, description="of pixels in 0..1; null: the model's own, else data_config's")
    student_std: Std | None = Field(None, description="of pixels in 0..1; null: the model's own, else data_config's")
    student_kwargs: dict[str, JsonValue] = Field(
        {}, description="arguments of the model's constructor, such as {img_size: 32}"
    )

    use_cls_token: bool = Field(
        True,
        description="image feature: the class token; false: mean of patches. "
        "A model that pools by attention gives what its pooling makes",
    )
    teacher_out_indices: OutIndices | None = Field(
        None, description="layers for the loss `layers`, such as [3, 7]; null: none. Intermediate ones, first to last"
    )
    student_out_indices: OutIndices | None = Field(
        None, description="the student's layers that face those, as many; null: none"
    )
    drop_path_rate: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.1, description="probability 0..1 of skipping a student block. For timm models that take it"
    )
    projector: ProjectorConfig = Field(ProjectorConfig(), description="student width -> teacher width")

    @field_validator("teacher_freeze")
    @classmethod
    def _check_frozen(cls, value: bool) -> bool:
        if not value:
            raise ValueError("expected true: the teacher never learns")
        return value

    def side(self, role: str) -> dict[str, Any]:
        """The settings of one model, role "teacher" or "student", by the names of ModelSpec's fields."""
        prefix = f"{role}_"
        keys = [key for key in type(self).model_fields if key.startswith(prefix) and key != "teacher_freeze"]
        own = {key.removeprefix(prefix): getattr(self, key) for key in keys}
        own |= {"drop_path_rate": self.drop_path_rate} if role == "student" else {}
        return own | {"use_cls_token": self.use_cls_token, "role": role}

    @model_validator(mode="after")
    def _check_sources(self) -> "ModelConfig":
        problems = []
        for side in ("teacher", "student"):
            source, repo = getattr(self, f"{side}_source"), getattr(self, f"{side}_repo")
            if source == "torch_hub" and repo is None:
                problems.append(f"{side}_source: torch_hub needs {side}_repo, a hub repository or a local folder")
            if source != "torch_hub" and repo is not None:
                problems.append(f"{side}_repo is read with {side}_source: torch_hub only, found {source}")
            if (getattr(self, f"{side}_mean") is None) != (getattr(self, f"{side}_std") is None):
                problems.append(f"{side}_mean and {side}_std go together: give both or neither")
        if self.teacher_projection and self.teacher_source != "timm":
            problems.append(f"teacher_projection is read with teacher_source: timm only, found {self.teacher_source}")
        if len(self.teacher_out_indices or []) != len(self.student_out_indices or []):
            problems.append("teacher_out_indices and student_out_indices go together: as many layers of each, or null")
        if problems:
            raise ValueError("\n".join(problems))
        return self
