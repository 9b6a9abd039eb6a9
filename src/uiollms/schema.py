"""JSON Schemas of the config files, generated from their typed models: `python -m uiollms.schema` writes config/schema/.

A file that names its schema in "$schema" gets completion and checks in most editors.
"""

import json
from pathlib import Path

from pydantic import BaseModel

from uiollms.config import EnvConfig, MemoryConfig, TestFile

SCHEMAS: dict[str, type[BaseModel]] = {"env.json": EnvConfig, "memory.json": MemoryConfig, "test.json": TestFile}


def schema_text(name: str) -> str:
    """The text of config/schema/<name>."""
    return json.dumps(SCHEMAS[name].model_json_schema(by_alias=True), indent=4) + "\n"


if __name__ == "__main__":
    folder = Path("config/schema")
    folder.mkdir(parents=True, exist_ok=True)
    for schema in SCHEMAS:
        (folder / schema).write_text(schema_text(schema))
        print(folder / schema)
