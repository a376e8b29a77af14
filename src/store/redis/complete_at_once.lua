-- Before all else, what is true of nearly every completion: the claim runs, and is the caller's. See complete.lua.
if redis.call('GETRANGE', KEYS[1], '0', '19') == 'tiR' .. ARGV[1]:sub(4, 20) then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.pcall(ARGV[3], KEYS[1], '')
  return 1
end
