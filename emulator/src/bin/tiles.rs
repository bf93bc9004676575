//! Prints the table of the kernels' tiles: `tiles kernels > src/launch/tile_table.rs`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernels = std::env::args_os().nth(1).ok_or("usage: tiles KERNELS")?;
    let cache = std::env::temp_dir();
    print!("{}", candle_sam_lora_emulator::tile_table(kernels.as_ref(), &cache)?);
    Ok(())
}
