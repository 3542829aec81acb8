"""What can be set (`schema`), and how it is read and checked (`loading`, `mistakes`)."""

from captcha_exp.config.loading import Machine as Machine
from captcha_exp.config.loading import data_from_json as data_from_json
from captcha_exp.config.loading import leaves as leaves
from captcha_exp.config.loading import load as load
from captcha_exp.config.loading import resolve as resolve
from captcha_exp.config.loading import sealed as sealed
from captcha_exp.config.loading import to_dict as to_dict
from captcha_exp.config.loading import to_yaml as to_yaml
from captcha_exp.config.schema import Article as Article
from captcha_exp.config.schema import Augment as Augment
from captcha_exp.config.schema import Captcha as Captcha
from captcha_exp.config.schema import CaptchaLibrary as CaptchaLibrary
from captcha_exp.config.schema import Compact as Compact
from captcha_exp.config.schema import Config as Config
from captcha_exp.config.schema import Data as Data
from captcha_exp.config.schema import Device as Device
from captcha_exp.config.schema import Drawn as Drawn
from captcha_exp.config.schema import Folder as Folder
from captcha_exp.config.schema import Generator as Generator
from captcha_exp.config.schema import Mlflow as Mlflow
from captcha_exp.config.schema import Model as Model
from captcha_exp.config.schema import NoTracking as NoTracking
from captcha_exp.config.schema import Precision as Precision
from captcha_exp.config.schema import ResNet18 as ResNet18
from captcha_exp.config.schema import Train as Train
from captcha_exp.config.schema import WheezyLibrary as WheezyLibrary
