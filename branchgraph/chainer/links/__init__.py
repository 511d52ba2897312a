"""`chainer.links`: layers with parameters."""

from branchgraph.chainer.links.activation import Highway, Maxout, PReLU, Swish
from branchgraph.chainer.links.blocks import Inception, InceptionBN, MLPConvolution2D
from branchgraph.chainer.links.classifier import Classifier
from branchgraph.chainer.links.connection import (
    Bias,
    Bilinear,
    Convolution1D,
    Convolution2D,
    Convolution3D,
    ConvolutionND,
    Deconvolution1D,
    Deconvolution2D,
    Deconvolution3D,
    DeconvolutionND,
    DepthwiseConvolution2D,
    DilatedConvolution2D,
    EmbedID,
    Linear,
    LocalConvolution2D,
    SimplifiedDropconnect,
)
from branchgraph.chainer.links.normalization import (
    BatchNormalization,
    GroupNormalization,
    LayerNormalization,
    Scale,
)
from branchgraph.chainer.links.parameter import Parameter
