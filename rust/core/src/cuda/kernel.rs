//! The kernels: their names, files and sizes.

use super::int8_choice::{Int8Product, Outliers};
use super::optim_kernels::OptimKernel;
use super::product::Product;
use crate::Dtype;
use crate::matmul4_instances::SCALES;

/// A kernel.
#[derive(Debug, Clone, Copy)]
pub enum Kernel {
    /// quantize.cu
    Quantize4(Dtype),
    /// quantize.cu
    Quantize8(Dtype),
    /// dequantize.cu
    Dequantize4(Dtype),
    /// dequantize.cu
    Dequantize4Nested(Dtype),
    /// dequantize.cu
    Dequantize8(Dtype),
    /// panel.cu
    Panel(Dtype),
    /// panel.cu
    PanelNested(Dtype),
    /// double_quant.cu
    QuantizeAbsmax,
    /// matmul4_*.cu
    Matmul4 {
        /// Which of them.
        product: Product,
        /// Type of the activations.
        dtype: Dtype,
        /// Whether the scales are.
        nested: bool,
    },
    /// optim8.cu, optim32.cu, optim_norm.cu
    Optim(OptimKernel),
    /// int8_rows.cu
    Int8Rows(Dtype),
    /// int8_rows.cu
    Int8Panel(Dtype),
    /// int8_plain.cu, int8_mma.cu, int8_skinny.cu, int8_wgmma.cu; without a type the int32 sums
    Int8(Int8Product, Option<Dtype>),
    /// int8_wgmma.cu's instances for outlier columns on 16-bit tensor cores, of float16 and bfloat16
    Int8Outliers(Int8Product, Dtype, Outliers),
}

impl Kernel {
    /// How many there are.
    pub const COUNT: usize = Self::OUTLIERS + Int8Product::ALL.len() * Dtype::ALL.len() * Outliers::NAMES.len();
    const MATMUL4: usize = 7 * Dtype::ALL.len() + 1;
    const OPTIM: usize = Self::MATMUL4 + Product::COUNT * Dtype::ALL.len() * 2;
    const INT8: usize = Self::OPTIM + OptimKernel::COUNT;
    const OUTLIERS: usize = Self::INT8 + 2 * Dtype::ALL.len() + Int8Product::ALL.len() * (Dtype::ALL.len() + 1);

    /// Its place in a device's table.
    pub fn index(self) -> usize {
        let types = Dtype::ALL.len();
        match self {
            Self::Quantize4(dtype) => dtype as usize,
            Self::Quantize8(dtype) => types + dtype as usize,
            Self::Dequantize4(dtype) => 2 * types + dtype as usize,
            Self::Dequantize4Nested(dtype) => 3 * types + dtype as usize,
            Self::Dequantize8(dtype) => 4 * types + dtype as usize,
            Self::Panel(dtype) => 5 * types + dtype as usize,
            Self::PanelNested(dtype) => 6 * types + dtype as usize,
            Self::QuantizeAbsmax => 7 * types,
            Self::Matmul4 { product, dtype, nested } => {
                Self::MATMUL4 + (product.index() * types + dtype as usize) * 2 + usize::from(nested)
            }
            Self::Optim(kernel) => Self::OPTIM + kernel.index(),
            Self::Int8Rows(dtype) => Self::INT8 + dtype as usize,
            Self::Int8Panel(dtype) => Self::INT8 + types + dtype as usize,
            Self::Int8(product, dtype) => {
                Self::INT8 + 2 * types + product as usize * (types + 1) + dtype.map_or(types, |dtype| dtype as usize)
            }
            Self::Int8Outliers(product, dtype, outliers) => {
                Self::OUTLIERS + (product as usize * types + dtype as usize) * Outliers::NAMES.len() + outliers as usize
            }
        }
    }

    /// Its file, without the ending.
    pub fn family(self) -> &'static str {
        match self {
            Self::Quantize4(_) | Self::Quantize8(_) => "quantize",
            Self::Dequantize4(_) | Self::Dequantize4Nested(_) | Self::Dequantize8(_) => "dequantize",
            Self::Panel(_) | Self::PanelNested(_) => "panel",
            Self::QuantizeAbsmax => "double_quant",
            Self::Matmul4 { product, .. } => product.family(),
            Self::Optim(kernel) => kernel.file(),
            Self::Int8Rows(_) | Self::Int8Panel(_) => "int8_rows",
            Self::Int8(product, _) | Self::Int8Outliers(product, ..) => product.family(),
        }
    }

    /// Its name in the source.
    pub fn name(self) -> String {
        match self {
            Self::Quantize4(dtype) => format!("quantize_4bit_{}", dtype.suffix()),
            Self::Quantize8(dtype) => format!("quantize_8bit_{}", dtype.suffix()),
            Self::Dequantize4(dtype) => format!("dequantize_4bit_{}", dtype.suffix()),
            Self::Dequantize4Nested(dtype) => format!("dequantize_4bit_nested_{}", dtype.suffix()),
            Self::Dequantize8(dtype) => format!("dequantize_8bit_{}", dtype.suffix()),
            Self::Panel(dtype) => format!("dequantize_4bit_panel_{}", dtype.suffix()),
            Self::PanelNested(dtype) => format!("dequantize_4bit_panel_nested_{}", dtype.suffix()),
            Self::QuantizeAbsmax => "quantize_absmax".to_string(),
            Self::Matmul4 { product, dtype, nested } => {
                format!("matmul4_{}_{}_{}", product.name(), dtype.suffix(), SCALES[usize::from(nested)])
            }
            Self::Optim(kernel) => kernel.name(),
            Self::Int8Rows(dtype) => format!("int8_quantize_rows_{}", dtype.suffix()),
            Self::Int8Panel(dtype) => format!("int8_dequantize_panel_{}", dtype.suffix()),
            Self::Int8(product, dtype) => format!("int8_{}_{}", product.name(), dtype.map_or("i32", Dtype::suffix)),
            Self::Int8Outliers(product, dtype, outliers) => {
                format!("int8_{}_{}_{}", product.name(), Outliers::NAMES[outliers as usize], dtype.suffix())
            }
        }
    }

    /// Threads of a block; the sources' `THREADS`.
    pub fn threads(self) -> u32 {
        match self {
            Self::Quantize4(_) | Self::Quantize8(_) => 1024,
            Self::QuantizeAbsmax => 512,
            Self::Matmul4 { product, .. } => product.threads(),
            Self::Optim(kernel) => kernel.threads(),
            Self::Int8(product, _) | Self::Int8Outliers(product, ..) => product.threads(),
            _ => 256,
        }
    }

    /// Bytes of shared memory that a launch of a target's image asks for.
    pub fn shared_bytes(self, target: &str) -> u32 {
        match self {
            Self::Matmul4 { product, .. } => product.shared_bytes(),
            Self::Optim(kernel) => kernel.shared_bytes(target),
            Self::Int8(product, _) | Self::Int8Outliers(product, ..) => product.shared_bytes(),
            _ => 0,
        }
    }
}
