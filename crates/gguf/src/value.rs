use crate::Fault;

/// Arrays in arrays: the deepest level accepted.
pub(crate) const MAX_DEPTH: u64 = 4;

/// Longest key or tensor name, in bytes: the limit of the GGUF specification for keys.
pub(crate) const MAX_NAME: u64 = 65_535;

/// Defines types and values by two lists: name, Rust type, name for a person, number in a file; and the least size in
/// bytes of what is no number.
macro_rules! values {
    (
        numbers { $($number:ident($of:ty), $text:literal, $id:literal;)+ }
        others { $($other:ident($other_of:ty), $other_text:literal, $other_id:literal, $size:literal;)+ }
    ) => {
        /// The type of a metadata value or of an array's elements. The discriminant is its number in a file.
        #[allow(missing_docs)] // the names say it all
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum ValueType {
            $($number = $id,)+
            $($other = $other_id,)+
        }

        /// Type, name, and size of an encoded value in bytes, for strings and arrays the least.
        const VALUE_TYPES: &[(ValueType, &str, u64)] = &[
            $((ValueType::$number, $text, size_of::<$of>() as u64),)+
            $((ValueType::$other, $other_text, $size),)+
        ];

        /// A metadata value; strings and arrays borrow from the file.
        #[allow(missing_docs)] // the names say it all
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub enum Value<'a> {
            $($number($of),)+
            $($other($other_of),)+
        }

        impl Value<'_> {
            /// The value's type.
            pub fn ty(&self) -> ValueType {
                match self {
                    $(Self::$number(_) => ValueType::$number,)+
                    $(Self::$other(_) => ValueType::$other,)+
                }
            }

            /// Appends the value as it stands in a file, without its type.
            pub(crate) fn encode(&self, out: &mut Vec<u8>) {
                match *self {
                    $(Self::$number(x) => out.extend(x.to_le_bytes()),)+
                    Self::Bool(x) => out.push(x.into()),
                    Self::Str(x) => {
                        out.extend((x.len() as u64).to_le_bytes());
                        out.extend(x.as_bytes());
                    }
                    Self::Array(x) => {
                        out.extend((x.element as u32).to_le_bytes());
                        out.extend((x.len as u64).to_le_bytes());
                        out.extend(x.bytes);
                    }
                }
            }
        }

        impl<'a> Cursor<'a> {
            /// A value that lies in `depth` arrays.
            pub(crate) fn value(&mut self, ty: ValueType, depth: u64) -> Read<Value<'a>> {
                Ok(match ty {
                    $(ValueType::$number => Value::$number(<$of>::from_le_bytes(self.array()?)),)+
                    ValueType::Bool => Value::Bool(self.bool()?),
                    ValueType::Str => Value::Str(self.str()?),
                    ValueType::Array => Value::Array(self.array_value(depth + 1)?),
                })
            }
        }
    };
}

values! {
    numbers {
        U8(u8), "u8", 0;
        I8(i8), "i8", 1;
        U16(u16), "u16", 2;
        I16(i16), "i16", 3;
        U32(u32), "u32", 4;
        I32(i32), "i32", 5;
        F32(f32), "f32", 6;
        U64(u64), "u64", 10;
        I64(i64), "i64", 11;
        F64(f64), "f64", 12;
    }
    others {
        Bool(bool), "bool", 7, 1;
        Str(&'a str), "str", 8, 8;
        Array(Array<'a>), "array", 9, 12;
    }
}

impl ValueType {
    fn from_id(id: u32) -> Option<Self> {
        VALUE_TYPES.iter().map(|row| row.0).find(|ty| *ty as u32 == id)
    }

    /// Name and least size in bytes.
    fn row(self) -> (&'static str, u64) {
        VALUE_TYPES.iter().find(|row| row.0 == self).map_or(("", 1), |row| (row.1, row.2))
    }

    /// "u32", "str".
    pub fn name(self) -> &'static str {
        self.row().0
    }
}

impl<'a> Value<'a> {
    /// An integer of any width. (128 bits hold both u64 and i64.)
    pub fn as_int(&self) -> Option<i128> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::I8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::I16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::I32(x) => Some(x.into()),
            Self::U64(x) => Some(x.into()),
            Self::I64(x) => Some(x.into()),
            _ => None,
        }
    }

    /// A float of either width; f64 is rounded to f32.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(x) => Some(x),
            Self::F64(x) => Some(x as f32),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(x) = *self { Some(x) } else { None }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&'a str> {
        if let Self::Str(x) = *self { Some(x) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        if let Self::Array(x) = *self { Some(x) } else { None }
    }
}

/// An array in place: its elements are decoded as they are iterated, never collected.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// `bytes` are the elements as they stand in a file, checked by the caller.
    pub(crate) fn new(element: ValueType, len: usize, bytes: &'a [u8]) -> Self {
        Self { element, len, bytes }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The type of all elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// The elements, whatever their type.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + Clone + use<'a> {
        let (element, mut cursor) = (self.element, Cursor::new(self.bytes, 0));
        // Cannot fail on bytes that were checked; it ends the iteration if a mapped file changed since.
        (0..self.len).map_while(move |_| cursor.value(element, 0).ok())
    }

    /// The elements of an array of strings.
    pub fn strs(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        (self.element == ValueType::Str).then(|| self.values().filter_map(|v| v.as_str()))
    }

    /// The elements of an array of f32 or f64 (rounded).
    pub fn f32s(&self) -> Option<impl Iterator<Item = f32> + use<'a>> {
        matches!(self.element, ValueType::F32 | ValueType::F64)
            .then(|| self.values().filter_map(|v| v.as_f32()))
    }

    /// The elements of an array of integers of any width.
    pub fn ints(&self) -> Option<impl Iterator<Item = i128> + use<'a>> {
        use ValueType::*;
        matches!(self.element, U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
            .then(|| self.values().filter_map(|v| v.as_int()))
    }

    /// The elements of an array of arrays.
    pub fn arrays(&self) -> Option<impl Iterator<Item = Array<'a>> + use<'a>> {
        (self.element == ValueType::Array).then(|| self.values().filter_map(|v| v.as_array()))
    }
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}; {}]", self.element, self.len)
    }
}

/// A result of reading: a fault comes with its position.
pub(crate) type Read<T> = Result<T, (u64, Fault)>;

/// A position in bytes that are not trusted.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Cursor<'a> {
    /// `pos` may lie outside, then nothing can be read.
    pub(crate) fn new(bytes: &'a [u8], pos: usize) -> Self {
        Self { bytes, pos: pos.min(bytes.len()) }
    }

    pub(crate) fn pos(&self) -> u64 {
        self.pos as u64
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    #[inline]
    pub(crate) fn take(&mut self, n: u64) -> Read<&'a [u8]> {
        if n > self.left() {
            return Err((self.pos(), Fault::Short { needed: n, left: self.left() }));
        }
        let taken = &self.bytes[self.pos..][..n as usize];
        self.pos += taken.len();
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `each` bytes of what follows the next `skip` bytes.
    pub(crate) fn count(&mut self, each: u64, skip: u64) -> Read<u64> {
        let start = self.pos();
        let count = self.u64()?;
        let left = self.left().saturating_sub(skip);
        if count > left / each {
            return Err((start, Fault::Count { count, each, left }));
        }
        Ok(count)
    }

    #[inline]
    pub(crate) fn str(&mut self) -> Read<&'a str> {
        let start = self.pos();
        let len = self.u64()?;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|e| (start, Fault::Utf8 { valid: e.valid_up_to() as u64 }))
    }

    /// A key or the name of a tensor.
    pub(crate) fn name(&mut self) -> Read<&'a str> {
        let start = self.pos();
        let len = self.clone().u64()?;
        if len > MAX_NAME {
            return Err((start, Fault::Limit { what: "bytes of name", found: len, limit: MAX_NAME }));
        }
        self.str()
    }

    pub(crate) fn value_type(&mut self) -> Read<ValueType> {
        let start = self.pos();
        let id = self.u32()?;
        ValueType::from_id(id).ok_or((start, Fault::ValueType { id }))
    }

    fn bool(&mut self) -> Read<bool> {
        let start = self.pos();
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [found] => Err((start, Fault::Bool { found })),
        }
    }

    /// Checks every element and steps over them.
    fn array_value(&mut self, depth: u64) -> Read<Array<'a>> {
        if depth > MAX_DEPTH {
            let fault = Fault::Limit { what: "levels of arrays", found: depth, limit: MAX_DEPTH };
            return Err((self.pos(), fault));
        }
        let element = self.value_type()?;
        let (_, size) = element.row();
        let len = self.count(size, 0)?;
        let start = self.pos;
        match element {
            ValueType::Str => {
                for _ in 0..len {
                    self.str()?;
                }
            }
            ValueType::Array | ValueType::Bool => {
                for _ in 0..len {
                    self.value(element, depth)?;
                }
            }
            _ => {
                self.take(len * size)?; // no overflow: count() compared it with the file's length
            }
        }
        Ok(Array::new(element, len as usize, &self.bytes[start..self.pos]))
    }
}
