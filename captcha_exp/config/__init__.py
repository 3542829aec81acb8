"""The config: its schema, loading, validation and error messages.

- `schema`: all groups of conf/, except `train` and `augment`, which are in `train`, `gpu` and `tracking`
- `validators`: rules for single values that need more than a type and limits
- `precision`: the precision that `auto` becomes on a device
- `loading`: `load` checks types and values, `resolve` replaces each `auto` that needs no trial
- `documents`: reads YAML and JSON with limits
- `uri`: addresses of stores; `trust`: those that a saved config may write to
- `messages`: one line per mistake, with the allowed values and the closest key
"""

from captcha_exp.config.gpu import Bounds as Bounds
from captcha_exp.config.gpu import GpuSpec as GpuSpec
from captcha_exp.config.loading import Machine as Machine
from captcha_exp.config.loading import choose_head as choose_head
from captcha_exp.config.loading import data_from_json as data_from_json
from captcha_exp.config.loading import flatten as flatten
from captcha_exp.config.loading import flatten_mapping as flatten_mapping
from captcha_exp.config.loading import frozen_without as frozen_without
from captcha_exp.config.loading import gpu_to_yaml as gpu_to_yaml
from captcha_exp.config.loading import load as load
from captcha_exp.config.loading import load_gpu as load_gpu
from captcha_exp.config.loading import plain_values as plain_values
from captcha_exp.config.loading import resolve as resolve
from captcha_exp.config.loading import to_dict as to_dict
from captcha_exp.config.loading import to_yaml as to_yaml
from captcha_exp.config.loading import with_captcha as with_captcha
from captcha_exp.config.loading import with_default_batch_size as with_default_batch_size
from captcha_exp.config.loading import with_gpu as with_gpu
from captcha_exp.config.loading import with_moved_store as with_moved_store
from captcha_exp.config.loading import with_tracking_uri as with_tracking_uri
from captcha_exp.config.precision import fast_precisions as fast_precisions
from captcha_exp.config.precision import has_tensor_cores as has_tensor_cores
from captcha_exp.config.precision import precision_of_cpu as precision_of_cpu
from captcha_exp.config.precision import precision_of_gpu as precision_of_gpu
from captcha_exp.config.precision import with_planned_precision as with_planned_precision
from captcha_exp.config.schema import ArticleConfig as ArticleConfig
from captcha_exp.config.schema import BaseGeneratorConfig as BaseGeneratorConfig
from captcha_exp.config.schema import CaptchaConfig as CaptchaConfig
from captcha_exp.config.schema import CaptchaLibraryConfig as CaptchaLibraryConfig
from captcha_exp.config.schema import CompactConfig as CompactConfig
from captcha_exp.config.schema import Config as Config
from captcha_exp.config.schema import DataConfig as DataConfig
from captcha_exp.config.schema import FolderConfig as FolderConfig
from captcha_exp.config.schema import GeneratorConfig as GeneratorConfig
from captcha_exp.config.schema import HeadName as HeadName
from captcha_exp.config.schema import ModelConfig as ModelConfig
from captcha_exp.config.schema import Precision as Precision
from captcha_exp.config.schema import ResNet18Config as ResNet18Config
from captcha_exp.config.schema import TextKind as TextKind
from captcha_exp.config.schema import WheezyLibraryConfig as WheezyLibraryConfig
from captcha_exp.config.tracking import MlflowConfig as MlflowConfig
from captcha_exp.config.tracking import check_model_name as check_model_name
from captcha_exp.config.train import CHECKPOINT_EVERY_PATTERN as CHECKPOINT_EVERY_PATTERN
from captcha_exp.config.train import AugmentConfig as AugmentConfig
from captcha_exp.config.train import TrainConfig as TrainConfig
from captcha_exp.config.trust import is_inside as is_inside
from captcha_exp.config.trust import untrusted_keys as untrusted_keys
from captcha_exp.config.uri import local_store_uri as local_store_uri
from captcha_exp.config.uri import moved_store_uri as moved_store_uri
from captcha_exp.config.uri import sqlite_path as sqlite_path
