"""A key that stands twice in a config is refused by name (the README's editors merge configs by hand); today the last one wins in silence."""
from tiny import *
workspace(tasks=[])
Path("env.json").write_text(Path("env.json").read_text().replace('"max_lr": 0.01', '"max_lr": 0.01, "max_lr": 0.5'))
from uiollms.config.load import load_env_config
from uiollms.files.errors import ConfigError
try: taken = load_env_config("env.json").train.max_lr
except ConfigError as error: verdict("max_lr" in str(error), f"refused: {str(error)[:100]}")
verdict(False, f'"max_lr": 0.01, "max_lr": 0.5 in one object: {taken} is taken without a word')
