"""The Helm chart: the objects of a deployment, with references to values.yaml in place of values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from trtqwen import __version__
from trtqwen.deploy.files import to_yaml
from trtqwen.deploy.objects import MERGE, Kubernetes, MakeObjects, Names, Object, base_objects, values_of

_REFERENCE = re.compile(r"'(\{\{ [^']* \}\})'")
_MERGED = re.compile(r"^( *)(- )?" + re.escape(MERGE) + r": (\{\{ .* \}\})$", re.MULTILINE)
_JSON = {"imagePullSecrets", "modelVolume", "resources", "nodeSelector", "tolerations"}
_SWITCHES = {
    "keda": 'eq .Values.autoscaler "keda"',
    "prometheus-adapter": 'eq .Values.autoscaler "prometheus-adapter"',
    "prometheus-operator": ".Values.prometheusOperator",
    "inference-extension": ".Values.inferenceExtension",
}


def chart_files(plan: Kubernetes, components: Mapping[str, MakeObjects]) -> dict[str, str]:
    """The chart; values.yaml switches its components on."""
    values = values_of(plan)
    references = {
        name: f"{{{{ toJson .Values.{name} }}}}" if name in _JSON else f"{{{{ .Values.{name} }}}}" for name in values
    }
    names = Names(
        references,
        name="{{ .Release.Name }}",
        namespace="{{ .Release.Namespace }}",
        several_nodes=plan.nodes > 1,
    )
    chart = {
        "apiVersion": "v2",
        "name": "trtqwen",
        "description": f"trtqwen serving the recipe {plan.recipe.name}",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.30.0-0",
    }
    switches = {"autoscaler": "none", "prometheusOperator": False, "inferenceExtension": False}
    heading = "autoscaler is none, keda or prometheus-adapter."
    files = {
        "helm/trtqwen/Chart.yaml": to_yaml(chart),
        "helm/trtqwen/values.yaml": to_yaml({**values, **switches}, heading=heading),
        "helm/trtqwen/templates/trtqwen.yaml": _template(base_objects(names, plan)),
    }
    for name, make in components.items():
        text = _template(make(names, plan))
        files[f"helm/trtqwen/templates/{name}.yaml"] = f"{{{{- if {_SWITCHES[name]} }}}}\n{text}{{{{- end }}}}\n"
    return files


def _template(objects: list[Object]) -> str:
    """Objects as Helm's template: references bare, and what Prometheus expands kept from Helm."""
    text = "---\n".join(
        yaml.safe_dump(_escape(item), sort_keys=False, allow_unicode=True, width=100_000) for item in objects
    )
    return _MERGED.sub(_include, _REFERENCE.sub(r"\1", text))


def _include(match: re.Match[str]) -> str:
    """A reference to a mapping whose fields belong next to others."""
    space, dash, reference = match[1], match[2] or "", match[3]
    value = reference[2:-2].strip().removeprefix("toJson ")
    return f"{space}{dash}{{{{- toYaml {value} | nindent {len(space) + len(dash)} }}}}"


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str) and re.search(r"\{\{ \$", value):
        return re.sub(r"\{\{ (\$.*?) \}\}", r"{{ `{{ \1 }}` }}", value)
    return value
