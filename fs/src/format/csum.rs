//! Checksums of ext4's metadata.
//!
//! Format: Linux `Documentation/filesystems/ext4/checksums.rst`.

/// CRC-32C as the kernel computes it: `seed` is the running value, neither end is inverted.
#[must_use]
pub fn crc32c(seed: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, data)
}

/// CRC-16 (polynomial 0x8005, reflected) of the `uninit_bg` group descriptors.
#[must_use]
pub fn crc16(seed: u16, data: &[u8]) -> u16 {
    data.iter().fold(seed, |crc, &byte| {
        let index = usize::from((crc ^ u16::from(byte)) & 0xff);
        (crc >> 8) ^ CRC16[index]
    })
}

const CRC16: [u16; 256] = {
    let mut table = [0u16; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u16;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xa001
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    #[test]
    fn check_values() {
        // The catalogue's check values: CRC-32C of "123456789" is e3069283, CRC-16/ARC bb3d.
        assert_eq!(!super::crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(super::crc16(0, b"123456789"), 0xbb3d);
    }
}
