"""What a dashboard in Grafana's classic JSON model must look like, as far as ours use it.

After Grafana's own schema: kinds/dashboard/dashboard_kind.cue, packages/grafana-schema/src/common/mudball.cue, and the
panelcfg.cue of the plugins `timeseries` and `stat`. No field is allowed that these do not know.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Text = Annotated[str, Field(min_length=1)]
Unit = Literal["none", "short", "s", "bytes", "Bps", "reqps", "percentunit", "dB"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Datasource(Part):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class GridPos(Part):
    h: int = Field(gt=0)
    w: int = Field(gt=0, le=24)
    x: int = Field(ge=0, lt=24)
    y: int = Field(ge=0)


class Target(Part):
    ref_id: str = Field(pattern="^[A-Z]$")
    datasource: Datasource
    editor_mode: Literal["code", "builder"]
    expr: Text
    legend_format: Text
    range: bool
    instant: bool


class Color(Part):
    mode: Literal["thresholds", "palette-classic", "palette-saturated", "continuous-GrYlRd", "fixed"]


class Stacking(Part):
    mode: Literal["none", "normal", "percent"]
    group: str


class Scale(Part):
    type: Literal["linear", "log", "ordinal", "symlog"]
    log: float | None = None


class GraphFieldConfig(Part):
    draw_style: Literal["line", "bars", "points"]
    line_width: float
    fill_opacity: float = Field(ge=0, le=100)
    show_points: Literal["auto", "never", "always"]
    span_nulls: bool
    stacking: Stacking
    scale_distribution: Scale


class FieldConfig(Part):
    unit: Unit
    color: Color
    custom: GraphFieldConfig | None = None


class FieldConfigSource(Part):
    defaults: FieldConfig
    overrides: list[None] = Field(max_length=0)


class Legend(Part):
    display_mode: Literal["list", "table", "hidden"]
    placement: Literal["bottom", "right"]
    show_legend: bool
    calcs: list[str]


class Tooltip(Part):
    mode: Literal["single", "multi", "none"]
    sort: Literal["asc", "desc", "none"]


class TimeseriesOptions(Part):
    legend: Legend
    tooltip: Tooltip


class ReduceOptions(Part):
    values: bool
    calcs: list[Text] = Field(min_length=1)
    fields: str


class StatOptions(Part):
    reduce_options: ReduceOptions
    orientation: Literal["auto", "vertical", "horizontal"]
    text_mode: Literal["auto", "value", "value_and_name", "name", "none"]
    color_mode: Literal["value", "background", "background_no_gradient", "none"]
    graph_mode: Literal["none", "line", "area"]
    justify_mode: Literal["auto", "center"]


class Row(Part):
    type: Literal["row"]
    id: int = Field(gt=0)
    title: Text
    collapsed: Literal[False]
    grid_pos: GridPos
    panels: list[None] = Field(max_length=0)


class Shown(Part):
    id: int = Field(gt=0)
    title: Text
    description: Text
    datasource: Datasource
    grid_pos: GridPos
    targets: list[Target] = Field(min_length=1, max_length=26)
    field_config: FieldConfigSource


class Timeseries(Shown):
    type: Literal["timeseries"]
    options: TimeseriesOptions
    repeat: Text | None = None
    repeat_direction: Literal["h", "v"] | None = None


class Stat(Shown):
    type: Literal["stat"]
    options: StatOptions


Panel = Annotated[Row | Timeseries | Stat, Field(discriminator="type")]


class DatasourceVariable(Part):
    type: Literal["datasource"]
    name: Text
    label: str
    query: Literal["prometheus"]
    hide: Literal[0, 1, 2]


class VariableQuery(Part):
    query: Text
    ref_id: Text


class QueryVariable(Part):
    type: Literal["query"]
    name: Text
    label: str
    datasource: Datasource
    definition: Text
    query: VariableQuery
    refresh: Literal[0, 1, 2]
    sort: int = Field(ge=0, le=8)
    multi: bool
    include_all: bool
    hide: Literal[0, 1, 2]


class Templating(Part):
    list: list[Annotated[DatasourceVariable | QueryVariable, Field(discriminator="type")]]


class AnnotationQuery(Part):
    name: Text
    datasource: Datasource
    enable: bool
    icon_color: Text
    expr: Text
    title_format: str
    text_format: str
    step: str


class Annotations(Part):
    list: list[AnnotationQuery]


class DashboardLink(Part):
    type: Literal["link", "dashboards"]
    title: Text
    icon: str
    tooltip: str
    url: str
    tags: list[Text]
    as_dropdown: bool
    target_blank: bool
    include_vars: bool
    keep_time: bool


class TimeRange(Part):
    from_: str = Field(alias="from", pattern="^now-")
    to: Literal["now"]


class Dashboard(Part):
    uid: str = Field(pattern="^[a-zA-Z0-9_-]{8,40}$")
    title: Text
    description: str
    tags: list[Text]
    timezone: Literal["browser", "utc"]
    editable: bool
    graph_tooltip: Literal[0, 1, 2]
    time: TimeRange
    refresh: str = Field(pattern="^[0-9]+[smh]$")
    schema_version: int = Field(ge=36)
    templating: Templating
    annotations: Annotations
    links: list[DashboardLink]
    panels: list[Panel]
