"""The script behind `mlflow models serve`: MLflow keeps a copy of it as the model ("models from code", so no pickle).

It is run, never imported, and so loads MLflow at once.  The work is done by generate/predict.py of the audiolm that is
installed where it is served: `--env-manager local`.
"""

from __future__ import annotations

import threading

import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Served(PythonModel):
    """A system that answers one request after another."""

    def load_context(self, context):
        from audiolm import store
        from audiolm.generate.predict import load_logged_system

        self.system = load_logged_system(store.get_json(context.artifacts["system"]))
        self.turn = threading.Lock()  # the server has threads, and torch's number of threads is the process's

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        from audiolm.generate.predict import predict

        try:
            with self.turn:
                return predict(self.system, model_input.to_dict("records"), params or {})
        except ValueError as e:
            raise MlflowException.invalid_parameter_value(str(e)) from e  # status 400


set_model(Served())
