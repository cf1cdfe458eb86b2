use std::ops::Range;

/// How many bytes a tensor takes.
#[derive(Clone, Copy)]
enum Layout {
    /// Rows of blocks: bytes before each row, elements a block, bytes a block.
    Rows { prefix: u64, block: u64, bytes: u64 },
    /// Four elements a byte without regard to rows, then this many bytes.
    Flat { suffix: u64 },
    /// Not derivable from the dimensions.
    Opaque,
}

const fn rows(prefix: u64, block: u64, bytes: u64) -> Layout {
    Layout::Rows { prefix, block, bytes }
}

/// Defines the types by a list of them: name, number in a file, ggml's name, layout.
macro_rules! tensor_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $ggml:literal, $layout:expr;)+) => {
        /// How the elements of a tensor are stored.
        ///
        /// Ids 0 to 35 are those of upstream ggml, 36 to 39 those of bitnet.cpp's fork of it, 134 and 135 those of ik_llama.cpp.
        #[allow(missing_docs, non_camel_case_types)] // the names are ggml's
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum TensorType {
            $($(#[$doc])* $name,)+
        }

        /// (type, id, ggml's name, layout), in the order of the enum.
        const TYPES: &[(TensorType, u32, &str, Layout)] = &[$((TensorType::$name, $id, $ggml, $layout)),+];
    };
}

tensor_types! {
    F32 = 0, "F32", rows(0, 1, 4);
    F16 = 1, "F16", rows(0, 1, 2);
    BF16 = 30, "BF16", rows(0, 1, 2);
    F64 = 28, "F64", rows(0, 1, 8);
    I8 = 24, "I8", rows(0, 1, 1);
    I16 = 25, "I16", rows(0, 1, 2);
    I32 = 26, "I32", rows(0, 1, 4);
    I64 = 27, "I64", rows(0, 1, 8);
    Q4_0 = 2, "Q4_0", rows(0, 32, 18);
    Q4_1 = 3, "Q4_1", rows(0, 32, 20);
    Q5_0 = 6, "Q5_0", rows(0, 32, 22);
    Q5_1 = 7, "Q5_1", rows(0, 32, 24);
    Q8_0 = 8, "Q8_0", rows(0, 32, 34);
    Q8_1 = 9, "Q8_1", rows(0, 32, 36);
    Q2_K = 10, "Q2_K", rows(0, 256, 84);
    Q3_K = 11, "Q3_K", rows(0, 256, 110);
    Q4_K = 12, "Q4_K", rows(0, 256, 144);
    Q5_K = 13, "Q5_K", rows(0, 256, 176);
    Q6_K = 14, "Q6_K", rows(0, 256, 210);
    Q8_K = 15, "Q8_K", rows(0, 256, 292);
    IQ1_S = 19, "IQ1_S", rows(0, 256, 50);
    IQ1_M = 29, "IQ1_M", rows(0, 256, 56);
    IQ2_XXS = 16, "IQ2_XXS", rows(0, 256, 66);
    IQ2_XS = 17, "IQ2_XS", rows(0, 256, 74);
    IQ2_S = 22, "IQ2_S", rows(0, 256, 82);
    IQ3_XXS = 18, "IQ3_XXS", rows(0, 256, 98);
    IQ3_S = 21, "IQ3_S", rows(0, 256, 110);
    IQ4_NL = 20, "IQ4_NL", rows(0, 32, 18);
    IQ4_XS = 23, "IQ4_XS", rows(0, 256, 136);
    TQ1_0 = 34, "TQ1_0", rows(0, 256, 54);
    TQ2_0 = 35, "TQ2_0", rows(0, 256, 66);
    /// Ternary, 2 bits a weight over the whole tensor, then one f32 scale in 32 bytes.
    I2S = 36, "I2_S", Layout::Flat { suffix: 32 };
    /// Ternary lookup tiles of bitnet.cpp for ARM; the size depends on parameters outside the file.
    TL1 = 38, "TL1", Layout::Opaque;
    /// Ternary lookup tiles of bitnet.cpp for x86; upstream ggml gives the same id to MXFP4, so the size is not known.
    TL2 = 39, "TL2", Layout::Opaque;
    /// Ternary, 13 bytes for 64 weights, each row behind an f16 scale.
    IQ1BN = 134, "IQ1_BN", rows(2, 64, 13);
    /// Ternary, 16 bytes for 64 weights, each row behind an f32 scale.
    IQ2BN = 135, "IQ2_BN", rows(4, 64, 16);
}

impl TensorType {
    /// Every type, in no meaningful order.
    pub fn all() -> impl Iterator<Item = Self> {
        TYPES.iter().map(|row| row.0)
    }

    /// The type with this number in a file, if it is a known one.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The type's number in a file.
    pub fn id(self) -> u32 {
        TYPES[self as usize].1
    }

    /// ggml's name: "F16", "I2_S".
    pub fn name(self) -> &'static str {
        TYPES[self as usize].2
    }

    /// Size of a tensor in bytes, for dimensions listed fastest first. None if the size is not derivable
    /// ([`size_is_known`](Self::size_is_known)), the elements do not fill whole blocks, or the size exceeds 64 bits.
    pub fn byte_len(self, dims: &[u64]) -> Option<u64> {
        match TYPES[self as usize].3 {
            Layout::Rows { prefix, block, bytes } => {
                let (&row, outer) = dims.split_first()?;
                let row_bytes = (row / block).checked_mul(bytes)?.checked_add(prefix)?;
                product(outer)?.checked_mul(row_bytes).filter(|_| row % block == 0)
            }
            Layout::Flat { suffix } => {
                let n = product(dims)?;
                (n / 4).checked_add(suffix).filter(|_| n % 4 == 0)
            }
            Layout::Opaque => None,
        }
    }

    /// False for TL1 and TL2: their size cannot be derived from the dimensions, so they can be listed, not used.
    pub fn size_is_known(self) -> bool {
        !matches!(TYPES[self as usize].3, Layout::Opaque)
    }
}

/// The number of elements; None above 64 bits.
pub(crate) fn product(dims: &[u64]) -> Option<u64> {
    dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim))
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the file.
    pub name: String,
    /// One to four sizes, none zero, the fastest-varying first: a matrix is `[columns, rows]`.
    pub dims: Vec<u64>,
    /// Storage of the elements.
    pub ty: TensorType,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Size of the data in bytes. For TL1 and TL2 all bytes up to the next tensor or the end of the file.
    pub byte_len: u64,
}

impl TensorInfo {
    /// The product of the dimensions.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Its bytes in the file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.byte_len)
    }
}

#[cfg(test)]
mod tests {
    use super::TensorType as T;

    #[test]
    fn ids_are_unique_and_round_trip() {
        for ty in T::all() {
            assert_eq!(T::from_id(ty.id()), Some(ty), "{ty}");
        }
        for removed in [4, 5, 31, 37, 40, 133, u32::MAX] {
            assert_eq!(T::from_id(removed), None);
        }
    }

    #[test]
    fn sizes_follow_the_formats() {
        assert_eq!(T::F32.byte_len(&[3, 5]), Some(60));
        assert_eq!(T::F16.byte_len(&[2560, 128_256]), Some(2 * 2560 * 128_256));
        assert_eq!(T::I2S.byte_len(&[2560, 6912]), Some(2560 * 6912 / 4 + 32));
        assert_eq!(T::I2S.byte_len(&[8640, 3200]), Some(8640 * 3200 / 4 + 32)); // rows straddle blocks
        assert_eq!(T::I2S.byte_len(&[3, 2]), None);
        assert_eq!(T::TQ1_0.byte_len(&[512, 3]), Some(3 * 2 * 54));
        assert_eq!(T::TQ2_0.byte_len(&[256]), Some(66));
        assert_eq!(T::TQ2_0.byte_len(&[128, 2]), None);
        assert_eq!(T::IQ1BN.byte_len(&[128, 7]), Some(7 * (2 + 2 * 13)));
        assert_eq!(T::IQ2BN.byte_len(&[128, 7]), Some(7 * (4 + 2 * 16)));
        assert_eq!(T::Q6_K.byte_len(&[256, 2, 2]), Some(840));
        assert_eq!(T::TL1.byte_len(&[256]), None);
        assert_eq!(T::F32.byte_len(&[u64::MAX, 2]), None);
        assert_eq!(T::I2S.byte_len(&[1 << 40, 1 << 40]), None);
        assert_eq!(T::F32.byte_len(&[]), None);
    }
}
