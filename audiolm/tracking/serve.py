"""The script behind `mlflow models serve`: MLflow keeps a copy of it as the model ("models from code", so no pickle).

It is run, never imported, and so loads MLflow at once.  The work is done by generate/predict.py of the audiolm that is
installed where it is served: `--env-manager local`.
"""

from __future__ import annotations

import math

import pandas
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel

SHARE = 0.95  # of the server's limit: so the answer's own reason comes before the server's


class Served(PythonModel):
    """A system within its limits.

    MLflow's server tells a model nothing of its callers, also not that one is gone.  It only leaves each alone after its own
    time limit, so a request is given up then.
    """

    def load_context(self, context):
        from audiolm import store
        from audiolm.config.serve import ServeConfig
        from audiolm.generate.predict import Service, load_logged_system

        limits = ServeConfig(**context.model_config)
        self.service = Service(load_logged_system(store.get_json(context.artifacts["system"])), limits)

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        from audiolm.generate.predict import Busy, TooLate

        served = _MLFLOW_IS_IN_SERVING_ENVIRONMENT.get()
        limit_s = SHARE * MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get() if served else math.inf
        try:
            return self.service.answer(model_input.to_dict("records"), params or {}, limit_s)
        except ValueError as e:
            raise MlflowException.invalid_parameter_value(str(e)) from e  # status 400
        except Busy as e:
            raise MlflowException(str(e), TEMPORARILY_UNAVAILABLE) from e  # status 503
        except TooLate as e:
            raise MlflowException(str(e), DEADLINE_EXCEEDED) from e  # status 504


set_model(Served())
