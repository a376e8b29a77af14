-- Before every script: reads the fixed header of the record under KEYS[1] (its layout is in layout.rs).
local head = redis.call('GETRANGE', KEYS[1], '0', '48')
local gone = head == '' and redis.call('EXISTS', KEYS[1]) == 0
local state = head:sub(3, 3)
local attempt = 0
local retention = 0
local remembered = false
if not gone then
  if #head < 49 or head:sub(1, 2) ~= 'ti' or not state:find('^[DFR]$') then
    return redis.error_reply('CORRUPT not a record of this crate')
  end
  attempt = struct.unpack('>I4', head, 21)
  retention = struct.unpack('>I8', head, 25)
  remembered = head:byte(49) == 1
end

local function id_of(record) return record:sub(5, 20) end
local function fingerprint_of(record) return record:sub(4, 4) .. record:sub(33, 48) end
local function with(record, state, number, remembered)
  local attempt = struct.pack('>I4', math.min(number, 4294967295))
  return record:sub(1, 2) .. state .. record:sub(4, 20) .. attempt .. record:sub(25, 48) .. (remembered and '\1' or '\0')
end

-- By the last of ARGV, which is `SPUBLISH` in a cluster. A user without rights to the channel must not turn a stored
-- outcome into an error.
local function tell() redis.pcall(ARGV[#ARGV], KEYS[1], '') end

