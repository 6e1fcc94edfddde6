"""Steering attention inside pretrained models, attached with :func:`attnlib.attach`."""

from ..hooks.branches import Branch, ImageTokens, NoImage, NullTokens, OtherPixels
from .agla import AGLA, BlipRelevance, grad_cam, mask_pixels, relevance_mask, spread_relevance
from .contrastive import ContrastiveDecoding, contrast
from .damro import DAMRO, select_outliers
from .diffusion.a_star import AStar, AttendExcite
from .diffusion.anagram import Anagram
from .diffusion.anymaker import AnyMaker
from .diffusion.attencraft import AttenCraft
from .diffusion.autostudio import AutoStudio, Scene, Studio, Subject, SubjectLatents
from .diffusion.c_upscale import CUpscale, PromptMaps
from .diffusion.clear import Clear
from .diffusion.customcontrast import CustomContrast, MultilevelContrast, SubjectEncoder
from .diffusion.disendiff import DisenDiff
from .diffusion.dra_ctrl import DimensionReduction
from .diffusion.dynamic_prompt import DynamicPrompt, LearntPrompt, LocatedPrompt
from .diffusion.edit import PromptToPrompt
from .diffusion.float_clothing import FlowAttention
from .diffusion.hidiffusion import HiDiffusion
from .diffusion.idol import JointModalities, dual_modal_loss
from .diffusion.invert import NullText
from .diffusion.ir_diffusion import IRDiffusion
from .diffusion.linfusion import LinFusion, distillation_losses
from .diffusion.losses import LatentUpdate, TokenUpdate
from .diffusion.mip_adapter import MIPAdapter
from .diffusion.pemf_vvto import PointSpatialAttention, PointTemporalAttention
from .diffusion.personalize import Personalize, load_personalized
from .diffusion.primecomposer import PrimeComposer
from .diffusion.realcustom import AdaptiveScoring, CrossScaleProjector, RealCustom, guidance_mask
from .diffusion.references import KeepKeys, KeyStore, ReferenceBranches, SharedKeys
from .diffusion.softpag import SoftPAG, adaptive_weight, guide, hunt_heads
from .diffusion.structured_guidance import StructuredGuidance
from .diffusion.textcengen import TextCenGen
from .diffusion.tiles import TiledDenoiser
from .diffusion.uniform_maps import UniformMaps
from .diffusion.variable_size import VariableSizeScale
from .diffusion.video import PARO, AdaSpa, BlockSparse, FrameTiles, MixtureOfBlocks, TileSearch
from .diffusion.vimaedit import ViMAEdit
from .diffusion.vsc import VSC, PrototypeFusion, Prototypes, fused_prompt
from .head_reinforcement import HeadDivergence, HeadReinforcement, head_divergence, sensitive_heads, token_divergence
from .head_scaling import HeadScale
from .lacing import DualAttention
from .magnifier import (
    DetailProjection,
    SceneMagnifier,
    convert_magnifier,
    detail_of_grid,
    detail_of_points,
    magnifier_layers,
    select_coarse,
)
from .p_laplacian import PLaplacian
from .sink_calibration import HeadSearch, SinkCalibration, calibrate, label_accuracy, search_heads
from .soft_guidance import NullImage, SoftImageGuidance
from .visual_boost import VisualBoost, boost, boost_sets, image_guidance
from .visual_redistribution import VisualRedistribution, find_sink_dims, redistribute, sink_tokens
from .wings import VisualWings, Wings

__all__ = [
    "DetailProjection",
    "SceneMagnifier",
    "convert_magnifier",
    "detail_of_grid",
    "detail_of_points",
    "magnifier_layers",
    "select_coarse",
    "AnyMaker",
    "MIPAdapter",
    "AGLA",
    "AStar",
    "AdaSpa",
    "AttenCraft",
    "AdaptiveScoring",
    "Anagram",
    "AttendExcite",
    "AutoStudio",
    "BlockSparse",
    "CUpscale",
    "CrossScaleProjector",
    "DAMRO",
    "PARO",
    "VSC",
    "BlipRelevance",
    "Branch",
    "Clear",
    "ContrastiveDecoding",
    "CustomContrast",
    "DisenDiff",
    "DimensionReduction",
    "DualAttention",
    "FlowAttention",
    "DynamicPrompt",
    "FrameTiles",
    "LearntPrompt",
    "LocatedPrompt",
    "TokenUpdate",
    "HeadDivergence",
    "HeadReinforcement",
    "HeadScale",
    "HeadSearch",
    "IRDiffusion",
    "HiDiffusion",
    "ImageTokens",
    "JointModalities",
    "LatentUpdate",
    "LinFusion",
    "MixtureOfBlocks",
    "MultilevelContrast",
    "NoImage",
    "NullImage",
    "NullText",
    "NullTokens",
    "OtherPixels",
    "PLaplacian",
    "PointSpatialAttention",
    "PointTemporalAttention",
    "PromptMaps",
    "Personalize",
    "RealCustom",
    "PrototypeFusion",
    "Prototypes",
    "Scene",
    "PrimeComposer",
    "PromptToPrompt",
    "SinkCalibration",
    "SoftImageGuidance",
    "SoftPAG",
    "StructuredGuidance",
    "Studio",
    "Subject",
    "SubjectEncoder",
    "SubjectLatents",
    "TileSearch",
    "TiledDenoiser",
    "UniformMaps",
    "VariableSizeScale",
    "TextCenGen",
    "ViMAEdit",
    "VisualBoost",
    "VisualRedistribution",
    "VisualWings",
    "Wings",
    "adaptive_weight",
    "boost",
    "boost_sets",
    "calibrate",
    "contrast",
    "distillation_losses",
    "dual_modal_loss",
    "find_sink_dims",
    "fused_prompt",
    "grad_cam",
    "guidance_mask",
    "guide",
    "head_divergence",
    "hunt_heads",
    "image_guidance",
    "label_accuracy",
    "load_personalized",
    "mask_pixels",
    "redistribute",
    "relevance_mask",
    "search_heads",
    "select_outliers",
    "sensitive_heads",
    "sink_tokens",
    "spread_relevance",
    "token_divergence",
    "KeepKeys",
    "KeyStore",
    "ReferenceBranches",
    "SharedKeys",
]
