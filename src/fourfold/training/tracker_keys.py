"""Keys of what a run is logged and uploaded to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fourfold.training.key_types import Strict, Text, false_is_none


class TrackerKeys(Strict):
    """Where a run is followed from."""

    use_tensorboard: bool = Field(False, description="true: log to TensorBoard, in output_dir")
    use_wandb: bool | None = Field(None, description="true: log to W&B; absent means where wandb_project is")
    wandb_project: Text | None = Field(None, description="the name of a project")
    wandb_entity: Text | None = Field(None, description="the name of a team or user")
    wandb_name: Text | None = Field(None, description="the name of the run")
    wandb_run_id: Text | None = Field(None, description="the id of a run, to go on with it")
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="`online`, `offline` or `disabled`"
    )
    wandb_watch: Annotated[
        Literal["gradients", "all", "parameters"] | None, BeforeValidator(false_is_none)
    ] = Field(None, description="`gradients`, `parameters` or `all`: histograms to record")
    wandb_log_model: Annotated[Literal["checkpoint", "end"] | None, BeforeValidator(false_is_none)] = Field(
        None, description="`checkpoint` or `end`: adapters to upload, and when"
    )
    use_mlflow: bool | None = Field(
        None, description="true: log to MLflow; absent means where mlflow_tracking_uri or _experiment_name is"
    )
    mlflow_tracking_uri: Text | None = Field(None, description="where the tracking server is")
    mlflow_experiment_name: Text | None = Field(None, description="the name of an experiment")
    mlflow_run_name: Text | None = Field(None, description="the name of the run")
    use_trackio: bool | None = Field(
        None, description="true: log to trackio; absent means where trackio_project_name is"
    )
    trackio_project_name: Text | None = Field(None, description="the name of a project")
    trackio_run_name: Text | None = Field(None, description="the name of the run")

    hub_model_id: Text | None = Field(
        None, description="owner/name of a (private) repository on the hub, to upload the adapter to"
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None = Field(
        None,
        description="`end`, `every_save` (the default), `checkpoint` or `all_checkpoints`: when",
    )
