"""The Terraform module: it parses, grants just what pipeline/storage asks for, and leaves nothing open."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml
from hcl2.utils import SerializationOptions

from pipeline.data.manifest import EMPTY_PREFIX
from pipeline.operate.bench.own_environment import own_environment
from pipeline.operate.doctor.stores import PROBE_PREFIX

pytestmark = pytest.mark.infra
ROOT = Path(__file__).parents[2]
MODULE = ROOT / "infra/terraform"
PREFIXES = {
    "images": "images/",
    "autoencoder": "autoencoder/",
    "latents": "latents/",
    "runs": "runs/",
    "temporary": "tmp/",
}
RIGHTS = {  # of botocore's methods, by S3's own list of which right each request asks for
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "complete_multipart_upload": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "delete_objects": "s3:DeleteObject",
    "get_object": "s3:GetObject",
    "head_bucket": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "upload_part": "s3:PutObject",
}
ON_BUCKET = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
SKIPPED = {  # of checkov, and why
    "CKV_AWS_18": "access logs of millions of range reads cost more than they tell; a site may turn them on",
    "CKV_AWS_144": "latents can be made again from images: nothing here is worth a second region",
    "CKV2_AWS_62": "nobody listens to events of this bucket",
}


@cache
def parsed() -> dict[str, dict[str, dict[str, Any]]]:
    """Kind of block -> type.name or name -> its content, of the whole module."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(MODULE.glob("*.tf")):
        for kind, blocks in read(file).items():
            for block in blocks:
                for name, content in block.items() if kind != "terraform" else [("terraform", block)]:
                    if kind in ("resource", "data"):
                        found.setdefault(kind, {}).update({f"{name}.{own}": about for own, about in content.items()})
                    else:
                        found.setdefault(kind, {})[name] = content
    return found


@cache
def read(file: Path) -> dict[str, Any]:
    plain = SerializationOptions(strip_string_quotes=True, explicit_blocks=False, with_comments=False)
    return hcl2.loads(file.read_text(), serialization_options=plain)


def statements(document: str) -> list[dict[str, Any]]:
    """Of a policy document, those included that depend on a variable."""
    content = parsed()["data"][f"aws_iam_policy_document.{document}"]
    dynamic = [block for one in content.get("dynamic", ()) for block in one["statement"]["content"]]
    return [*content.get("statement", ()), *dynamic]


def filled(text: str) -> str:
    return re.sub(r"\$\{var\.prefixes\.(\w+)\}", lambda match: PREFIXES[match[1]], text)


def granted(role: str) -> set[tuple[str, str]]:
    """Rights and resources (patterns of keys; empty = the bucket) of a role, with the default prefixes."""
    lists = parsed()["locals"]["roles"][role]
    found = set()
    for one in statements("storage"):
        resources = one["resources"]
        if isinstance(resources, str):
            match = re.fullmatch(
                r'\$\{\[for prefix in each\.value\.(\w+) : "\$\{aws_s3_bucket\.data\.arn\}/\$\{prefix\}\*"\]\}',
                resources,
            )
            assert match, f"not a list of prefixes: {resources}"
            patterns = [f"{filled(prefix)}*" for prefix in lists[match[1]]]
        else:
            assert resources in (["${aws_s3_bucket.data.arn}"], ["${statement.value}"]), resources
            patterns = [""]
        found |= {(action, pattern) for action in one["actions"] for pattern in patterns}
    return found


def may(role: str, method: str, key: str = "") -> bool:
    """Whether a role may make a request of Lathe's."""
    right = RIGHTS[method]
    key = "" if right in ON_BUCKET else key
    return any(action == right and fnmatchcase(key, pattern) for action, pattern in granted(role))


def test_files_parse_and_know_their_variables():
    variables = parsed()["variable"]
    for file in [*MODULE.glob("*.tf"), *MODULE.glob("example/*.tf")]:
        assert read(file), file
    used = {name for file in MODULE.glob("*.tf") for name in re.findall(r"\bvar\.(\w+)", file.read_text())}
    assert used == set(variables), "each is used, and each that is used is there"
    assert all(variable["description"] and "type" in variable for variable in variables.values())
    example = read(MODULE / "example/main.tf")["module"][0]["lathe"]
    given = set(example) - {"source"}
    required = {name for name, variable in variables.items() if "default" not in variable}
    assert required <= given <= set(variables)


def test_references_lead_somewhere():
    there = {*parsed()["resource"], *(f"data.{name}" for name in parsed()["data"])}
    text = "\n".join(file.read_text() for file in MODULE.glob("*.tf"))
    named = {"".join(parts) for parts in re.findall(r"\b(data\.)?(aws_[a-z0-9_]+\.[a-z_]+)\b", text)}
    assert named <= there
    assert set(re.findall(r"\blocal\.(\w+)", text)) == set(parsed()["locals"])


def test_numbers_and_names_are_validated():
    checked = {name for name, variable in parsed()["variable"].items() if variable.get("validation")}
    free = {"instance_profiles", "pod_identity", "tags"}
    assert checked == set(parsed()["variable"]) - free
    (pattern,) = re.findall(
        r'regex\("(.*?)", var\.bucket\)', parsed()["variable"]["bucket"]["validation"][0]["condition"]
    )
    assert [bool(re.fullmatch(pattern.strip("^$"), name)) for name in ("my-lathe", "My.Bucket", "a")] == [
        True,
        False,
        False,
    ]


def test_the_bucket_is_closed_and_encrypted():
    resources = parsed()["resource"]
    block = resources["aws_s3_bucket_public_access_block.data"]
    names = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert [block[name] for name in names] == [True] * 4
    (rule,) = resources["aws_s3_bucket_server_side_encryption_configuration.data"]["rule"]
    (default,) = rule["apply_server_side_encryption_by_default"]
    assert '"AES256" : "aws:kms"' in default["sse_algorithm"]
    (owner,) = resources["aws_s3_bucket_ownership_controls.data"]["rule"]
    assert owner["object_ownership"] == "BucketOwnerEnforced"
    (versions,) = resources["aws_s3_bucket_versioning.data"]["versioning_configuration"]
    assert versions["status"] == "Enabled"
    assert resources["aws_s3_bucket.data"]["lifecycle"] == [{"prevent_destroy": True}]
    assert all(
        one["bucket"].endswith("aws_s3_bucket.data.id}") for name, one in resources.items() if "_bucket_" in name
    )


def test_only_denials_are_for_everybody():
    tls = statements("bucket")
    assert {one["sid"] for one in tls} == {"TlsOnly", "NoOldTls"}
    for one in tls:
        assert one["effect"] == "Deny"
        assert one["resources"] == ["${aws_s3_bucket.data.arn}", "${aws_s3_bucket.data.arn}/*"]
    assert parsed()["resource"]["aws_s3_bucket_policy.data"]["policy"].endswith("aws_iam_policy_document.bucket.json}")


def test_what_is_left_behind_goes():
    rules = {rule["id"]: rule for rule in parsed()["resource"]["aws_s3_bucket_lifecycle_configuration.data"]["rule"]}
    assert all(rule["status"] == "Enabled" for rule in rules.values())
    assert "abort_incomplete_multipart_upload" in rules["unfinished-uploads"]
    assert "noncurrent_version_expiration" in rules["deleted"]
    current = {name for name, rule in rules.items() if "days" in rule.get("expiration", [{}])[0]}
    assert current == {"temporary"}, "nothing else that is there is ever deleted"
    assert rules["temporary"]["filter"] == [{"prefix": "${var.prefixes.temporary}"}]


def requests() -> set[str]:
    """Every request to S3 that pipeline/storage makes."""
    found = set()
    for file in (ROOT / "pipeline/storage").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "call",
                "_call",
                "_checked",
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    return found


def test_rights_are_those_that_storage_asks_for():
    assert requests() == set(RIGHTS), "a new request wants a right, and one that is gone has one too many"
    for role in ("encode", "train"):
        actions = {action for action, _ in granted(role)}
        assert actions == set(RIGHTS.values()) | {"kms:Decrypt", "kms:GenerateDataKey"}
    everything = [
        action for document in ("storage", "trust") for one in statements(document) for action in one["actions"]
    ]
    assert not [action for action in everything if "*" in action]


@pytest.mark.parametrize(
    ("role", "reads", "writes", "deletes"),
    [
        ("encode", "images/ autoencoder/ latents/", "latents/", ""),
        ("train", "autoencoder/ latents/ runs/", "runs/", "runs/"),
    ],
)
def test_roles_reach_what_is_theirs(role, reads, writes, deletes):
    for prefix in PREFIXES.values():
        key = f"{prefix}set/00000.tar"
        assert may(role, "get_object", key) == may(role, "head_object", key) == (prefix in reads.split())
        for method in ("put_object", "create_multipart_upload", "upload_part", "abort_multipart_upload"):
            assert may(role, method, key) == (prefix in writes.split()), (method, prefix)
        assert may(role, "delete_objects", key) == (prefix in deletes.split())
        assert not may(role, "put_object", "elsewhere/x")
    assert may(role, "list_objects_v2")
    assert may(role, "head_bucket")


def test_encode_deletes_the_empty_prompt_and_the_doctors_probe_alone():
    for folder in ("latents/", "latents/sd15-512/"):
        assert may("encode", "delete_objects", f"{folder}{EMPTY_PREFIX}tokens.clip.npy")
        assert may("encode", "delete_objects", f"{folder}{PROBE_PREFIX}0123456789abcdef")
        assert not may("encode", "delete_objects", f"{folder}00000.tar")
        assert not may("encode", "delete_objects", f"{folder}manifest.json")


def test_roles_reach_what_the_stages_of_kubernetes_write():
    for stage, role in (("encode", "encode"), ("train", "train"), ("export", "train")):
        objects = yaml.safe_load_all((ROOT / f"infra/kubernetes/base/{stage}.yaml").read_text())
        text = next(one["data"]["run.yaml"] for one in objects if one["kind"] == "ConfigMap")
        output = re.search(r"^output: \$\{root\}/(.*)$", text, re.MULTILINE)
        key = f"{output[1]}/x".replace("run/", PREFIXES["runs"], 1)  # docs/cloud.md: prefixes = { runs = "run/" }
        assert may(role, "put_object", key), key


def test_roles_are_taken_by_named_principals_only():
    for one in statements("trust"):
        (principals,) = one["principals"]
        assert "*" not in str(principals["identifiers"]), one["sid"]
    conditions = {one["sid"]: [c["variable"] for c in one.get("condition", ())] for one in statements("trust")}
    assert len(conditions["ServiceAccounts"]) == len(conditions["PodIdentity"]) == 2, (
        "account and namespace, or audience"
    )
    accounts = yaml.safe_load_all((ROOT / "infra/kubernetes/base/service-accounts.yaml").read_text())
    known = {name for role in parsed()["locals"]["roles"].values() for name in role["service_accounts"]}
    assert known == {account["metadata"]["name"] for account in accounts}


@pytest.mark.long
@pytest.mark.tools
def test_checkov_finds_nothing_but_what_is_meant(pytestconfig):
    assert all(len(reason) > 20 for reason in SKIPPED.values())
    folder = Path(pytestconfig.cache.mkdir("checkov"))
    programs = own_environment(folder, Path(__file__).with_name("checkov.txt"))
    command = [
        programs / "checkov",
        "--directory",
        MODULE,
        "--framework",
        "terraform",
        "--skip-download",
        "--output",
        "json",
    ]
    done = subprocess.run(
        command, env={**os.environ, "LOG_LEVEL": "ERROR"}, capture_output=True, text=True, check=False, timeout=300
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 40, "it has looked"
    assert {one["check_id"] for one in report["results"]["failed_checks"]} == set(SKIPPED), (
        "and none is skipped in vain"
    )
