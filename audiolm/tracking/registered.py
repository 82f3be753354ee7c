"""What MLflow's registered versions refer to in a store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from audiolm import store
from audiolm.tracking import client as mlflow_client
from audiolm.tracking import outbox
from audiolm.tracking.lookup import system_of
from audiolm.tracking.registry import search


def registered(tracking: str, folder: str) -> Iterator[tuple[str, str]]:
    """(models:/NAME/VERSION, a text with every path that it names) of the versions whose weights are kept.

    `tracking` as in a config. Raises ValueError where MLflow does not answer.
    """
    uri, _ = outbox.resolve(tracking, folder)
    database = mlflow_client.database_path(uri) if uri else None
    if uri is None or (database and not os.path.exists(database)):
        return
    client = mlflow_client.connect(uri)
    try:
        for version in search(client, ""):
            if "pruned" not in version.tags:
                system = system_of(version, uri) if "audiolm.system" in version.tags else {}
                yield f"models:/{version.name}/{version.version}", json.dumps([dict(version.tags), system])
    except Exception as e:
        raise ValueError(f"MLflow at {store.hide_credentials(uri)} must say which versions are registered, and does not "
                         f"({outbox.first_line(e)}): start it, or name another by tracking=...") from e
